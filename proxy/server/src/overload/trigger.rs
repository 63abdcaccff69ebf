//! From pressures to states, without a clock and without I/O.

/// When the pressure of a resource makes an action act.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Trigger {
    /// From this pressure on, in full.
    Threshold(f64),
    /// Above the first pressure a little, from the second on in full.
    Scaled(f64, f64),
}

impl Trigger {
    /// The state, from 0 to 1.
    pub(super) fn state(self, pressure: f64) -> f64 {
        match self {
            Self::Threshold(value) => f64::from(u8::from(pressure >= value)),
            Self::Scaled(from, _) if pressure <= from => 0.0,
            // In single precision, as in Envoy: half way between 0.4 and 0.8 is a half.
            Self::Scaled(from, to) => f64::from(((pressure - from) / (to - from)).min(1.0) as f32),
        }
    }
}

/// Resources and what depends on them, both by number.
#[derive(Debug, Default)]
pub(super) struct Core {
    dependents: Vec<Dependent>,
}

/// An action or load-shed point.
#[derive(Debug)]
struct Dependent {
    /// For each resource that has a say its number, and what the trigger made of its last pressure.
    triggers: Vec<(usize, Trigger, f64)>,
    /// The highest of these.
    state: f64,
}

impl Core {
    /// Adds what depends on these resources. Its number is the count of those before it.
    pub(super) fn add(&mut self, triggers: impl IntoIterator<Item = (usize, Trigger)>) {
        let triggers = triggers.into_iter().map(|(resource, trigger)| (resource, trigger, 0.0)).collect();
        self.dependents.push(Dependent { triggers, state: 0.0 });
    }

    /// A resource has this pressure now: tells the states that change by it.
    pub(super) fn update(&mut self, resource: usize, pressure: f64, mut changed: impl FnMut(usize, f64)) {
        for (number, dependent) in self.dependents.iter_mut().enumerate() {
            for (of, trigger, state) in &mut dependent.triggers {
                if *of == resource {
                    *state = trigger.state(pressure);
                }
            }
            let state = dependent.triggers.iter().fold(0.0, |most: f64, (_, _, state)| most.max(*state));
            if state != dependent.state {
                dependent.state = state;
                changed(number, state);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_of_triggers() {
        let threshold = Trigger::Threshold(0.9);
        let scaled = Trigger::Scaled(0.5, 0.75);
        for (trigger, pressure, state) in [
            (threshold, 0.0, 0.0),
            (threshold, 0.89, 0.0),
            (threshold, 0.9, 1.0),
            (threshold, 3.0, 1.0),
            (Trigger::Threshold(0.0), 0.0, 1.0),
            (scaled, 0.5, 0.0),
            (scaled, 0.625, 0.5),
            (scaled, 0.75, 1.0),
            (Trigger::Scaled(0.4, 0.8), 0.6, 0.5),
            (scaled, 2.0, 1.0),
        ] {
            assert_eq!(trigger.state(pressure), state, "{trigger:?} at {pressure}");
        }
    }

    #[test]
    fn the_highest_trigger_decides_and_only_changes_are_told() {
        let mut core = Core::default();
        core.add([(0, Trigger::Threshold(0.9)), (1, Trigger::Scaled(0.0, 1.0))]);
        core.add([(1, Trigger::Threshold(0.5))]);
        let mut told = |resource, pressure| {
            let mut changes = Vec::new();
            core.update(resource, pressure, |number, state| changes.push((number, state)));
            changes
        };
        assert_eq!(told(0, 0.8), []);
        assert_eq!(told(1, 0.5), [(0, 0.5), (1, 1.0)]);
        assert_eq!(told(1, 0.5), []);
        assert_eq!(told(0, 0.95), [(0, 1.0)]);
        assert_eq!(told(1, 0.0), [(1, 0.0)], "the other resource still saturates the first");
        assert_eq!(told(0, 0.0), [(0, 0.0)]);
        assert_eq!(told(7, 1.0), [], "a resource that nothing depends on");
    }
}
