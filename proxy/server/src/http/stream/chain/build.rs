//! The filters' instances: made for the stream's route, made anew behind a filter that has waited for one, told of the end.

use std::sync::Arc;

use waystation_filter_api::http::{FilterConfig, Flow, HttpFilterFactory};
use waystation_route::{Action, ClusterSpecifier, FilterLevels, FilterSlot};

use super::station::Station;
use super::{Chain, Selected, Slot, Way};
use crate::http::downstream::Downstream;
use crate::http::end::StreamEnd;
use crate::http::filters::FilterEntry;
use crate::http::stream::Stream;

impl<D: Downstream> Stream<'_, D> {
    /// Makes the filters' instances for the stream's route.
    pub(in crate::http::stream) fn build_chain(&mut self) {
        self.complete_chain();
        if self.cx.hcm.filters.is_empty() {
            return;
        }
        let mut chain = std::mem::take(&mut self.chain);
        chain.recycle();
        chain.route = self.selected();
        self.add_filters(&mut chain, 0, true);
        self.chain = chain;
        if !self.chain.is_empty() {
            self.note_cluster();
        }
    }

    /// The route, with the weighted cluster that the router will pick as long as the request stays as it is.
    pub(in crate::http::stream) fn selected(&self) -> Option<Selected> {
        let (table, route) = self.table.as_ref()?;
        let weighted = match table.held.route(*route).map(|route| &route.action) {
            Some(Action::Route(action)) if matches!(action.clusters, ClusterSpecifier::Weighted(_)) => {
                let hash = self.hash(&action.hash_policies, &mut Vec::new());
                self.target(action, hash).1
            }
            _ => None,
        };
        Some(Selected { table: table.clone(), route: *route, weighted })
    }

    /// Adds the filters from `first` on. The route may disable them, if it is one that the stream began with.
    fn add_filters(&self, chain: &mut Chain, first: usize, begins: bool) {
        for (i, entry) in self.cx.hcm.filters.iter().enumerate().skip(first) {
            let slot = chain.route.as_ref().and_then(|selected| *selected.table.slots.get(i)?);
            chain.add(i, entry, slot, begins);
        }
    }

    /// Selects the route anew for the filter that has waited for that, and shows it the head once more. The filters behind
    /// it, which have not seen the stream yet, are made for a route that has now been found. Those in front of it have decided
    /// without one, and do not see the stream again, as in Envoy: what decides about access belongs behind it.
    pub(super) fn look_again_through(&mut self, chain: &mut Chain, step: usize) -> Result<Flow, StreamEnd> {
        let had_route = self.table.is_some();
        self.info.upstream.cluster = None;
        self.select_route()?;
        self.check_upgrade()?;
        if !had_route && self.table.is_some() {
            let entry = chain.slots[step].entry;
            // Those that it has been given beside it stay.
            let behind = chain.slots.iter().rposition(|slot| slot.entry == entry).unwrap_or(step) + 1;
            chain.slots.truncate(behind);
            chain.configure(self.selected());
            self.add_filters(chain, entry + 1, false);
        }
        self.note_cluster();
        Ok(chain.show_head(self, Way::Request, step))
    }

    /// Tells the filters of the end.
    pub(in crate::http::stream) fn complete_chain(&mut self) {
        if self.chain.is_empty() {
            return;
        }
        self.with_chain(|chain, stream| chain.complete(stream));
    }
}

impl Chain {
    /// Has the filters that there are configured by another route.
    pub(super) fn configure(&mut self, route: Option<Selected>) {
        self.route = route;
        for slot in &mut self.slots {
            slot.levels = self.route.as_ref().and_then(|selected| *selected.table.slots.get(slot.entry)?);
        }
    }

    /// Makes the filters' instances for an attempt of a request to this route.
    pub(in crate::http::stream) fn fill(&mut self, entries: &[FilterEntry], route: Option<Selected>) {
        self.route = route;
        for (i, entry) in entries.iter().enumerate() {
            // Only requests to clusters that have filters pay for the look-up.
            let slot = self.route.as_ref().and_then(|selected| selected.table.held.filter_slot(&entry.name));
            self.add(i, entry, slot, true);
        }
    }

    fn add(&mut self, index: usize, entry: &FilterEntry, slot: Option<FilterSlot>, begins: bool) {
        let levels = levels(self.route.as_ref(), slot);
        if levels.disabled.filter(|_| begins).unwrap_or(entry.disabled) {
            return;
        }
        // A route without configuration for it is not asked for that in each phase.
        let slot = slot.filter(|_| !levels.configs.is_empty());
        if let Some(slot) = Slot::new(index, slot, &entry.factory, levels.configs) {
            self.phases.response_body |= slot.phases.response_body;
            self.slots.push(slot);
        }
    }

    /// Puts filters beside the one at `index` of `slots`, where a message that goes this way comes to them next.
    pub(super) fn put_beside(&mut self, way: Way, index: usize, factories: Vec<Arc<dyn HttpFilterFactory>>) {
        let Slot { entry, levels: slot, .. } = self.slots[index];
        let configs = levels(self.route.as_ref(), slot).configs;
        let made = factories.into_iter().filter_map(|factory| {
            let made = Slot::new(entry, slot, &factory, configs)?;
            // Whoever made it is not the entry's own factory.
            Some(Slot { factory: made.factory.or(Some(factory)), ..made })
        });
        let made: Vec<Slot> = made.collect();
        let at = match way {
            Way::Request => index + 1,
            Way::Response => index,
        };
        // Steps count from the message's end of the list, so those that hold a head are found by their places.
        let held = [(Way::Request, self.request.head_at), (Way::Response, self.response.head_at)]
            .map(|(way, step)| (way, self.place(way, step)));
        for (way, place) in held {
            let place = if place >= at { place + made.len() } else { place };
            self.lane(way).head_at = match way {
                Way::Request => place,
                Way::Response => self.slots.len() + made.len() - 1 - place,
            };
        }
        self.phases.response_body |= made.iter().any(|slot| slot.phases.response_body);
        self.slots.splice(at..at, made);
    }
}

impl Slot {
    /// With an instance for a stream whose route configures it so, if the stream needs one.
    fn new(
        entry: usize,
        levels: Option<FilterSlot>,
        factory: &Arc<dyn HttpFilterFactory>,
        configs: &[FilterConfig],
    ) -> Option<Self> {
        let in_force = factory.in_force();
        let factory = in_force.as_deref().unwrap_or(&**factory);
        let (filter, phases) = (factory.create(configs)?, factory.phases());
        let (request, response) = (Station::default(), Station::default());
        Some(Self { entry, levels, factory: in_force, filter, phases, request, response })
    }
}

/// What a route says about a filter.
pub(super) fn levels(selected: Option<&Selected>, slot: Option<FilterSlot>) -> FilterLevels<'_> {
    let (Some(selected), Some(slot)) = (selected, slot) else { return FilterLevels::default() };
    let Some(route) = selected.table.held.route(selected.route) else { return FilterLevels::default() };
    let weighted = match (&route.action, selected.weighted) {
        (Action::Route(action), Some(picked)) => match &action.clusters {
            ClusterSpecifier::Weighted(all) => all.clusters().get(picked),
            _ => None,
        },
        _ => None,
    };
    route.filter_config(weighted, slot)
}
