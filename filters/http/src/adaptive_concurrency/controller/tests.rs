use std::thread;

use waystation_stats::Store;

use super::*;

const FIXED: Parameters = Parameters {
    update_interval: Duration::from_millis(100),
    min_rtt: MinRtt::Fixed(Duration::from_millis(10)),
    first_limit: 3,
    min_limit: 3,
    max_limit: 1000,
    buffer: 0.25,
    percentile: 0.5,
};

const SAMPLED: MinRtt = MinRtt::Sampled { interval: Duration::from_secs(60), jitter: 0.5, requests: 5 };

fn controller(parameters: Parameters, now: Instant) -> Arc<Controller> {
    let stats = Store::default().root().scope("gradient_controller").group();
    Arc::new(Controller::new(parameters, stats, now))
}

fn limit(controller: &Controller) -> u32 {
    controller.limit.load(Ordering::Relaxed)
}

#[test]
fn the_gradient_and_its_bounds() {
    let next = |limit, millis| {
        let Next { gradient, limit, .. } =
            next_limit(&FIXED, limit, Duration::from_millis(10), Duration::from_millis(millis));
        (gradient, limit)
    };
    assert_eq!(next(100, 1), (2.0, 214), "twice as much and its root");
    assert_eq!(next(100, 1000), (0.5, 57));
    assert_eq!(next(16, 10), (1.25, 24));
    assert_eq!(next(3, 1000), (0.5, 3), "not below the least");
    assert_eq!(next(900, 1), (2.0, 1000), "not above the most");
    let least = Parameters { min_limit: 50, max_limit: 20, ..FIXED };
    let time = Duration::from_millis(10);
    assert_eq!(next_limit(&least, 16, time, time).limit, 50);
}

#[test]
fn no_more_than_the_limit_and_each_place_comes_back() {
    let now = Instant::now();
    let parameters = Parameters { first_limit: 7, update_interval: Duration::from_secs(3600), ..FIXED };
    let controller = controller(parameters, now);
    let most = AtomicU32::new(0);
    let under_way = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..5_000 {
                    let places: Vec<_> =
                        (0..2).filter_map(|_| Controller::enter(&controller, now, 0)).collect();
                    let count = places.len() as u32;
                    most.fetch_max(under_way.fetch_add(count, Ordering::SeqCst) + count, Ordering::SeqCst);
                    under_way.fetch_sub(count, Ordering::SeqCst);
                }
            });
        }
    });
    assert!(most.into_inner() <= 7);
    assert_eq!(controller.outstanding.load(Ordering::Relaxed), 0);
}

#[test]
fn the_minimum_is_measured_by_few_and_anew_when_the_limit_stays_down() {
    let start = Instant::now();
    let controller = controller(Parameters { min_rtt: SAMPLED, ..FIXED }, start);
    let at = |millis| start + Duration::from_millis(millis);
    assert!(controller.is_measuring());
    let serve = |from: u64, took: u64| {
        let place = Controller::enter(&controller, at(from), 0).expect("there is a place");
        place.served(at(from), Duration::from_millis(took), at(from + took), 0);
    };
    for request in 0..5 {
        assert!(controller.is_measuring());
        serve(request * 20, 10);
    }
    assert!(!controller.is_measuring());
    assert_eq!(controller.stats.min_rtt_msecs().value(), 10);
    // Quick: the limit grows with each window.
    serve(200, 10);
    serve(320, 10);
    assert!(limit(&controller) > 3, "{}", limit(&controller));
    // Slow for long: it falls to its least, and stays there until that is suspicious.
    let mut now = 500;
    while !controller.is_measuring() {
        serve(now, 500);
        now += 600;
        assert!(now < 60_000, "before the next measurement is due");
    }
    assert_eq!(limit(&controller), 3);
    // What was under way before says nothing of an upstream without load.
    controller.samples.take(1.0);
    controller.sample(start, Duration::from_secs(1), at(now), 0);
    assert!(controller.samples.is_empty());
}

#[test]
fn measurements_are_spread_by_their_jitter() {
    let start = Instant::now();
    for (random, seconds) in [(0, 60.0), (u64::MAX / 2, 75.0), (u64::MAX, 90.0)] {
        let controller = controller(Parameters { min_rtt: SAMPLED, ..FIXED }, start);
        for _ in 0..5 {
            let place = Controller::enter(&controller, start, 0).unwrap();
            place.served(start, Duration::from_millis(10), start, random);
        }
        let next = controller.state.lock().next_measurement.unwrap();
        let after = (next - start).as_secs_f64();
        assert!((after - seconds).abs() < 0.01, "{after}");
    }
}

/// An upstream that serves ten at a time in 10 ms each, and is slower in proportion to what is beyond.
#[test]
fn a_seeded_simulation_finds_what_upstream_can_carry() {
    for seed in 0..10 {
        let mut random = fastrand::Rng::with_seed(seed);
        let start = Instant::now();
        let controller = controller(Parameters { buffer: 0.5, ..FIXED }, start);
        let mut limits = Vec::new();
        for tick in 0..5_000_u64 {
            let now = start + Duration::from_millis(tick * 10);
            // Far more come than can be served.
            let places: Vec<_> = (0..200).map_while(|_| Controller::enter(&controller, now, 0)).collect();
            let load = (places.len() as f64 / 10.0).max(1.0);
            for place in places {
                let took = Duration::from_secs_f64(0.01 * load * (0.9 + 0.2 * random.f64()));
                place.served(now, took, now + took, random.u64(..));
            }
            if tick > 1_000 {
                limits.push(limit(&controller));
            }
        }
        let mean = limits.iter().map(|limit| f64::from(*limit)).sum::<f64>() / limits.len() as f64;
        // Half as slow again is allowed, and the root of the limit for bursts.
        assert!((10.0..=30.0).contains(&mean), "seed {seed}: {mean}");
    }
}
