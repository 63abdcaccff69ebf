//! `envoy.overload_actions.reduce_timeouts`: timeouts that become shorter as the pressure rises.

use std::sync::Arc;
use std::time::Duration;

use super::Level;

/// The timeouts that can be scaled, by their names in `ScaleTimersOverloadActionConfig.TimerType`.
#[derive(Clone, Debug, Default)]
pub struct ScaledTimeouts {
    /// `HTTP_DOWNSTREAM_CONNECTION_IDLE`.
    pub connection_idle: Scale,
    /// `HTTP_DOWNSTREAM_STREAM_IDLE`.
    pub stream_idle: Scale,
    /// `TRANSPORT_SOCKET_CONNECT`.
    pub transport_socket_connect: Scale,
    /// `HTTP_DOWNSTREAM_CONNECTION_MAX`.
    pub connection_max: Scale,
    /// `HTTP_DOWNSTREAM_STREAM_FLUSH`.
    pub stream_flush: Scale,
}

/// How one kind of timeout is scaled: by each action instance that names it, the shortest result counting.
#[derive(Clone, Debug, Default)]
pub struct Scale(Vec<(Arc<Level>, Minimum)>);

/// What remains of a timeout at full pressure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Minimum {
    /// This, or the timeout itself if that is shorter.
    Absolute(Duration),
    /// This share of it.
    Share(f64),
}

impl ScaledTimeouts {
    /// Whether the configuration scales any.
    pub fn is_set(&self) -> bool {
        let Self { connection_idle, stream_idle, transport_socket_connect, connection_max, stream_flush } =
            self;
        [connection_idle, stream_idle, transport_socket_connect, connection_max, stream_flush]
            .into_iter()
            .any(|scale| !scale.is_none())
    }
}

impl Scale {
    /// Whether the configuration scales it at all.
    pub fn is_none(&self) -> bool {
        self.0.is_empty()
    }

    /// What a timeout of `max` is at the present pressure: between `max` and the minimum, in proportion.
    pub fn of(&self, max: Duration) -> Duration {
        self.0.iter().map(|(level, minimum)| minimum.scaled(max, level.value())).fold(max, Duration::min)
    }

    pub(super) fn add(&mut self, level: &Arc<Level>, minimum: Minimum) {
        self.0.push((Arc::clone(level), minimum));
    }
}

impl Minimum {
    fn scaled(self, max: Duration, level: f64) -> Duration {
        let min = match self {
            Self::Absolute(min) => min.min(max),
            Self::Share(share) => max.mul_f64(share),
        };
        min + (max - min).mul_f64(1.0 - level)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_shrinks_to_its_minimum() {
        let (level, other) = (Arc::new(Level::default()), Arc::new(Level::default()));
        let mut scale = Scale::default();
        let seconds = Duration::from_secs;
        assert!(scale.is_none());
        assert_eq!(scale.of(seconds(100)), seconds(100));
        scale.add(&level, Minimum::Absolute(seconds(20)));
        scale.add(&other, Minimum::Share(0.5));
        for (first, second, expected) in [(0.0, 0.0, 100), (0.5, 0.0, 60), (1.0, 0.0, 20), (0.25, 1.0, 50)] {
            level.set(first);
            other.set(second);
            assert_eq!(scale.of(seconds(100)), seconds(expected), "{first} {second}");
        }
        level.set(1.0);
        assert_eq!(scale.of(seconds(10)), seconds(5), "a minimum never prolongs");
    }
}
