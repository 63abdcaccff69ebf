//! Groups: a struct of stats that share a scope, declared once, stored compactly.

use std::sync::Arc;

use crate::Unit;
use crate::cells::Cells;
use crate::handles::{CounterRef, GaugeRef, HistogramRef};

/// The names of a group, relative to its scope. Made by [`stats_group!`](crate::stats_group).
#[derive(Debug)]
pub struct GroupDef {
    /// Counter names.
    pub counters: &'static [&'static str],
    /// Gauge names.
    pub gauges: &'static [&'static str],
    /// Histogram names and units.
    pub histograms: &'static [(&'static str, Unit)],
}

/// A struct declared by [`stats_group!`](crate::stats_group); get one from [`Scope::group`](crate::Scope::group).
pub trait Group: Clone {
    /// The names.
    const DEF: &'static GroupDef;
    /// Wraps the storage of one instance.
    fn from_cells(cells: GroupCells) -> Self;
}

/// The storage behind one group instance: what a [`Group`] wraps.
#[derive(Clone, Debug)]
pub struct GroupCells(pub(crate) Arc<Cells>);

impl GroupCells {
    /// The counter at `index` in the group's table.
    #[inline]
    pub fn counter(&self, index: usize) -> CounterRef<'_> {
        CounterRef { cells: &self.0, slot: index }
    }

    /// The gauge at `index` in the group's table.
    #[inline]
    pub fn gauge(&self, index: usize) -> GaugeRef<'_> {
        GaugeRef { cells: &self.0, index }
    }

    /// The histogram at `index` in the group's table.
    #[inline]
    pub fn histogram(&self, index: usize) -> HistogramRef<'_> {
        HistogramRef { cells: &self.0, index }
    }
}

/// Declares a group of stats: a cheaply cloned handle with one method per stat.
///
/// ```
/// waystation_stats::stats_group! {
///     /// What a listener counts.
///     pub struct ListenerStats {
///         counters { downstream_cx_total, overflow = "downstream_cx_overflow" }
///         gauges { downstream_cx_active }
///         histograms { downstream_cx_length_ms: Milliseconds }
///     }
/// }
/// # let store = waystation_stats::Store::default();
/// let stats: ListenerStats = store.root().scope("listener").tag("envoy.listener_address", "0.0.0.0_80").group();
/// stats.downstream_cx_active().inc();
/// stats.overflow().add(2);
/// ```
///
/// A name is the identifier, unless `= "..."` gives another one (relative to the scope; it may contain dots). Each of
/// the three sections may be left out, but their order is fixed.
#[macro_export]
macro_rules! stats_group {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident {
            $(counters { $($(#[$cmeta:meta])* $counter:ident $(= $counter_name:literal)?),* $(,)? })?
            $(gauges { $($(#[$gmeta:meta])* $gauge:ident $(= $gauge_name:literal)?),* $(,)? })?
            $(histograms { $($(#[$hmeta:meta])* $histogram:ident $(= $histogram_name:literal)? : $unit:ident),* $(,)? })?
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug)]
        $vis struct $name($crate::GroupCells);

        const _: () = {
            #[expect(non_camel_case_types, reason = "the variants are the stats' names")]
            #[allow(dead_code, clippy::enum_variant_names, reason = "a group may have no counters")]
            enum Counters { $($($counter),*)? }
            #[expect(non_camel_case_types, reason = "the variants are the stats' names")]
            #[allow(dead_code, clippy::enum_variant_names, reason = "a group may have no gauges")]
            enum Gauges { $($($gauge),*)? }
            #[expect(non_camel_case_types, reason = "the variants are the stats' names")]
            #[allow(dead_code, clippy::enum_variant_names, reason = "a group may have no histograms")]
            enum Histograms { $($($histogram),*)? }

            impl $crate::Group for $name {
                const DEF: &'static $crate::GroupDef = {
                    static DEF: $crate::GroupDef = $crate::GroupDef {
                        counters: &[$($($crate::stats_group!(@name $counter $($counter_name)?)),*)?],
                        gauges: &[$($($crate::stats_group!(@name $gauge $($gauge_name)?)),*)?],
                        histograms: &[
                            $($(($crate::stats_group!(@name $histogram $($histogram_name)?), $crate::Unit::$unit)),*)?
                        ],
                    };
                    &DEF
                };

                fn from_cells(cells: $crate::GroupCells) -> Self {
                    Self(cells)
                }
            }

            #[allow(dead_code, reason = "a stat that is never written is still listed, as 0")]
            impl $name {
                $($(
                    $(#[$cmeta])*
                    #[doc = concat!("Counter `", $crate::stats_group!(@name $counter $($counter_name)?), "`.")]
                    #[inline]
                    $vis fn $counter(&self) -> $crate::CounterRef<'_> {
                        self.0.counter(Counters::$counter as usize)
                    }
                )*)?
                $($(
                    $(#[$gmeta])*
                    #[doc = concat!("Gauge `", $crate::stats_group!(@name $gauge $($gauge_name)?), "`.")]
                    #[inline]
                    $vis fn $gauge(&self) -> $crate::GaugeRef<'_> {
                        self.0.gauge(Gauges::$gauge as usize)
                    }
                )*)?
                $($(
                    $(#[$hmeta])*
                    #[doc = concat!("Histogram `", $crate::stats_group!(@name $histogram $($histogram_name)?), "`.")]
                    #[inline]
                    $vis fn $histogram(&self) -> $crate::HistogramRef<'_> {
                        self.0.histogram(Histograms::$histogram as usize)
                    }
                )*)?
            }
        };
    };
    (@name $ident:ident) => { stringify!($ident) };
    (@name $ident:ident $name:literal) => { $name };
}
