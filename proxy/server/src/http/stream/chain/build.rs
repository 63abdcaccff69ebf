//! The filters' instances: made for the stream's route, made anew behind a filter that has waited for one, told of the end.

use std::rc::Rc;

use waystation_filter_api::http::Flow;
use waystation_route::FilterLevels;

use super::station::{Station, Stop};
use super::{Chain, Shown, Slot, Way};
use crate::http::Table;
use crate::http::downstream::Downstream;
use crate::http::end::StreamEnd;
use crate::http::stream::Stream;

impl<D: Downstream> Stream<'_, D> {
    /// Makes the filters' instances for the stream's route.
    pub(in crate::http::stream) fn build_chain(&mut self) {
        self.complete_chain();
        self.chain = Chain::default();
        if self.cx.hcm.filters.is_empty() {
            return;
        }
        self.chain.route = self.table.clone();
        self.add_filters(0, true);
        if !self.chain.is_empty() {
            self.note_cluster();
        }
    }

    /// Adds the filters from `first` on. The route may disable them, if it is one that the stream began with.
    fn add_filters(&mut self, first: usize, begins: bool) {
        let hcm = &self.cx.hcm;
        for (i, entry) in hcm.filters.iter().enumerate().skip(first) {
            let levels = levels(self.chain.route.as_ref(), i);
            if levels.disabled.filter(|_| begins).unwrap_or(entry.disabled) {
                continue;
            }
            let in_force = entry.factory.in_force();
            let factory = in_force.as_deref().unwrap_or(&*entry.factory);
            let Some(filter) = factory.create(levels.configs) else { continue };
            let phases = factory.phases();
            let all = &mut self.chain.phases;
            all.response_body |= phases.response_body;
            self.chain.slots.push(Slot {
                entry: i,
                factory: in_force,
                filter,
                phases,
                request: Station::default(),
                response: Station::default(),
            });
        }
    }

    /// Selects the route anew for the filter that has waited for that, and shows it the head once more. The filters behind
    /// it, which have not seen the stream yet, are made for a route that has now been found.
    pub(super) fn look_again(&mut self, step: usize) -> Result<Flow, StreamEnd> {
        self.chain.station(Way::Request, step).stop = Stop::Open;
        let had_route = self.table.is_some();
        self.info.upstream.cluster = None;
        self.select_route()?;
        self.check_upgrade()?;
        if !had_route && self.table.is_some() {
            let entry = self.chain.slots[step].entry;
            self.chain.slots.truncate(step + 1);
            self.chain.route = self.table.clone();
            self.add_filters(entry + 1, false);
        }
        self.note_cluster();
        let end = self.chain.request.head_is_all;
        let flow = self.phase(Way::Request, step, Shown::Head { end });
        self.select_anew();
        Ok(flow)
    }

    pub(in crate::http::stream) fn complete_chain(&mut self) {
        for step in 0..self.chain.slots.len() {
            if self.chain.slots[step].phases.complete {
                self.phase(Way::Request, step, Shown::Complete);
            }
        }
    }
}

/// What a route says about the filter in this place.
pub(super) fn levels(table: Option<&(Rc<Table>, u32)>, entry: usize) -> FilterLevels<'_> {
    table
        .and_then(|(table, index)| {
            let route = table.held.route(*index)?;
            Some(route.filter_config(None, (*table.slots.get(entry)?)?))
        })
        .unwrap_or_default()
}
