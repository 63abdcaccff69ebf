//! Hosts: what is known of one endpoint, and what is counted of it.
//!
//! A [`Host`] is one description of an endpoint, immutable; [`HostState`] is what lives as long as the endpoint does
//! (identity, health, counts). An update that changes only the weight, health or metadata of an endpoint makes a new
//! description around the same state, so that connection pools (keyed by [`Host::id`]), counts and health carry over.

use std::fmt;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3 as core;
use waystation_filter_api::address::Address;
use waystation_filter_api::stream::HostView;
use waystation_filter_api::value::{Metadata, Value};

use crate::admission::{Line, Place};
use crate::cluster::TransportFactory;
use crate::health_check::Verdict;
use crate::outlier::Monitor;

/// An endpoint as the configuration in force describes it.
pub struct Host {
    pub(crate) state: Arc<HostState>,
    pub(crate) address: Address,
    pub(crate) locality: Arc<Locality>,
    pub(crate) metadata: Option<Arc<Metadata>>,
    /// `load_balancing_weight`, at least 1.
    pub(crate) weight: u32,
    pub(crate) priority: u32,
    pub(crate) transport: TransportFactory,
    pub(crate) details: Option<Box<HostDetails>>,
}

/// What few endpoints have.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostDetails {
    /// The endpoint's DNS name: `Endpoint.hostname`, or the name that was resolved.
    pub hostname: Box<str>,
    /// Further addresses of the same endpoint, for Happy Eyeballs (`additional_addresses`).
    pub additional_addresses: Box<[Address]>,
    /// Where and how the endpoint is checked, for active health checking.
    pub health_check: Option<HealthCheckTarget>,
}

/// `Endpoint.HealthCheckConfig`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HealthCheckTarget {
    /// Another address to check.
    pub address: Option<Address>,
    /// Another port of the address that is checked.
    pub port: Option<u16>,
    /// The host name in the check.
    pub hostname: Box<str>,
    /// Whether active checks are switched off for this endpoint.
    pub disabled: bool,
}

/// `envoy.config.core.v3.Locality`.
#[derive(Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Locality {
    /// The region.
    pub region: Box<str>,
    /// The zone.
    pub zone: Box<str>,
    /// The sub-zone.
    pub sub_zone: Box<str>,
}

/// What lives as long as the endpoint, shared by all its descriptions.
#[derive(Debug)]
pub struct HostState {
    id: u64,
    health: AtomicU32,
    /// When the host came in or last became healthy, in milliseconds of [`clock_ms`]: the start of slow start.
    ramp_start_ms: AtomicU64,
    /// What outlier detection counts, in clusters that have it.
    monitor: Option<Arc<Monitor>>,
    /// Who waits for a connection to it.
    line: Line,
    counts: Counts,
}

/// All on one cache line: a request pulls the line once when it starts and once when it ends.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Counts {
    cx_total: AtomicU64,
    cx_active: AtomicU32,
    rq_pending_active: AtomicU32,
    cx_connect_fail: AtomicU64,
    rq_total: AtomicU64,
    rq_active: AtomicU64,
    rq_success: AtomicU64,
    rq_error: AtomicU64,
    rq_timeout: AtomicU64,
}

/// The counts of a host at one moment, as `/clusters` and load reports show them.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct HostCounts {
    /// Connections made.
    pub cx_total: u64,
    /// Connections open.
    pub cx_active: u64,
    /// Connections that failed.
    pub cx_connect_fail: u64,
    /// Requests sent.
    pub rq_total: u64,
    /// Requests in flight.
    pub rq_active: u64,
    /// Requests that wait for a connection to the host.
    pub rq_pending_active: u64,
    /// Requests that were answered without a 5xx.
    pub rq_success: u64,
    /// Requests that failed or were answered with a 5xx.
    pub rq_error: u64,
    /// Requests that timed out.
    pub rq_timeout: u64,
}

/// How a request ended, from the host's point of view.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Answered without a 5xx.
    Success,
    /// Answered with a 5xx, or failed.
    Error,
    /// Given up after a timeout; counts as an error too.
    Timeout,
    /// Abandoned for a reason that says nothing about the host (the client went away).
    Cancelled,
}

/// Coarse health: which lists of a host set a host is in.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Health {
    /// Not used outside panic mode.
    Unhealthy,
    /// Used when the healthy hosts do not suffice.
    Degraded,
    /// Used.
    Healthy,
}

/// A reason why a host is not plainly healthy. The text is that of `/clusters` `health_flags`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum HealthFlag {
    /// Failed active health checks.
    FailedActiveHc = 1,
    /// Ejected by outlier detection.
    FailedOutlierCheck = 1 << 1,
    /// EDS says it is unhealthy.
    FailedEdsHealth = 1 << 2,
    /// Active health checks say degraded.
    DegradedActiveHc = 1 << 3,
    /// EDS says degraded.
    DegradedEdsHealth = 1 << 4,
    /// Removed by discovery, kept because it is still healthy.
    PendingDynamicRemoval = 1 << 5,
    /// Not checked yet.
    PendingActiveHc = 1 << 6,
    /// Out of the calculation of panic and priorities after `x-envoy-immediate-health-check-fail`.
    ExcludedViaImmediateHcFail = 1 << 7,
    /// The last active check timed out.
    ActiveHcTimeout = 1 << 8,
    /// EDS says draining.
    EdsStatusDraining = 1 << 9,
    /// Outlier detection says degraded.
    DegradedOutlierDetection = 1 << 10,
}

impl HealthCheckTarget {
    /// The address to check of a host at `address`.
    pub(crate) fn address(&self, address: &Address) -> Address {
        match (self.address.as_ref().unwrap_or(address), self.port) {
            (Address::Ip(at), Some(port)) => Address::Ip((at.ip(), port).into()),
            (at, _) => at.clone(),
        }
    }
}

impl HealthFlag {
    /// Flags that active health checks set and clear.
    pub(crate) const ACTIVE: u32 = Self::FailedActiveHc as u32
        | Self::DegradedActiveHc as u32
        | Self::PendingActiveHc as u32
        | Self::ExcludedViaImmediateHcFail as u32
        | Self::ActiveHcTimeout as u32;

    /// All flags in the order in which Envoy prints them, with their text.
    pub const ALL: [(Self, &'static str); 11] = [
        (Self::FailedActiveHc, "/failed_active_hc"),
        (Self::FailedOutlierCheck, "/failed_outlier_check"),
        (Self::FailedEdsHealth, "/failed_eds_health"),
        (Self::DegradedActiveHc, "/degraded_active_hc"),
        (Self::DegradedEdsHealth, "/degraded_eds_health"),
        (Self::PendingDynamicRemoval, "/pending_dynamic_removal"),
        (Self::PendingActiveHc, "/pending_active_hc"),
        (Self::ExcludedViaImmediateHcFail, "/excluded_via_immediate_hc_fail"),
        (Self::ActiveHcTimeout, "/active_hc_timeout"),
        (Self::EdsStatusDraining, "/eds_status_draining"),
        (Self::DegradedOutlierDetection, "/degraded_outlier_detection"),
    ];

    /// Flags that EDS sets and clears.
    const EDS: u32 =
        Self::FailedEdsHealth as u32 | Self::DegradedEdsHealth as u32 | Self::EdsStatusDraining as u32;
    const UNHEALTHY: u32 = Self::FailedActiveHc as u32
        | Self::FailedOutlierCheck as u32
        | Self::FailedEdsHealth as u32
        | Self::EdsStatusDraining as u32;
    const DEGRADED: u32 = Self::DegradedActiveHc as u32
        | Self::DegradedEdsHealth as u32
        | Self::DegradedOutlierDetection as u32;
    const EXCLUDED: u32 = Self::PendingActiveHc as u32
        | Self::ExcludedViaImmediateHcFail as u32
        | Self::EdsStatusDraining as u32;
}

/// A host as streams of one worker refer to it (`UpstreamInfo.host` wants an `Rc` of it).
#[derive(Clone, Debug)]
pub struct HostRef(pub Arc<Host>);

/// A request in flight on a host; ends it as [`Outcome::Cancelled`] when dropped without [`ActiveRequest::finish`].
///
/// It holds the worker's own reference: a shared count beside the address would bounce between workers on each request.
#[derive(Debug)]
pub struct ActiveRequest(Rc<HostRef>);

/// A request that waits for a connection to a host.
#[derive(Debug)]
pub struct PendingRequest(Rc<HostRef>);

/// An open connection to a host.
#[derive(Debug)]
pub struct ActiveConnection(Rc<HostRef>);

impl Host {
    /// A number unique to this endpoint in this process, stable over updates: the key of connection pools.
    pub fn id(&self) -> u64 {
        self.state.id
    }

    /// Where to connect.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Further addresses to try when the first does not answer.
    pub fn additional_addresses(&self) -> &[Address] {
        self.details.as_ref().map_or(&[], |details| &details.additional_addresses)
    }

    /// The DNS name, empty when there is none (`auto_host_rewrite`, ring hash by hostname).
    pub fn hostname(&self) -> &str {
        self.details.as_ref().map_or("", |details| &details.hostname)
    }

    /// Where active health checks go, when not to the address.
    pub fn health_check(&self) -> Option<&HealthCheckTarget> {
        self.details.as_ref()?.health_check.as_ref()
    }

    /// Whether active health checks are switched off for it.
    pub fn is_unchecked(&self) -> bool {
        self.health_check().is_some_and(|target| target.disabled)
    }

    /// Where active health checks go.
    pub fn health_check_address(&self) -> Address {
        match self.health_check() {
            Some(target) => target.address(&self.address),
            None => self.address.clone(),
        }
    }

    /// All flags, for what decides on them.
    pub fn flags(&self) -> u32 {
        self.state.flags()
    }

    /// Puts the verdict of a health check in force; whoever does publishes it if it says so (`Cluster::refresh`).
    pub fn judge(&self, verdict: &Verdict, now: Instant) {
        self.state.change(verdict.set, verdict.clear, now);
    }

    /// Endpoint metadata.
    pub fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_deref()
    }

    /// Where it runs.
    pub fn locality(&self) -> &Arc<Locality> {
        &self.locality
    }

    /// `load_balancing_weight`.
    pub fn weight(&self) -> u32 {
        self.weight
    }

    /// The priority level it is in.
    pub fn priority(&self) -> u32 {
        self.priority
    }

    /// What secures connections to it: the product of the factory that compiled the cluster's transport sockets, chosen
    /// by endpoint metadata.
    pub fn transport(&self) -> &TransportFactory {
        &self.transport
    }

    /// Whether it is a canary (`envoy.lb` metadata `canary: true`).
    pub fn canary(&self) -> bool {
        self.lb_metadata("canary") == Some(&Value::Bool(true))
    }

    /// What the endpoint is hashed by: metadata `envoy.lb` `hash_key`, or its name or address.
    pub(crate) fn hash_key(&self, by_hostname: bool) -> String {
        match self.lb_metadata("hash_key") {
            Some(Value::String(key)) if !key.is_empty() => (**key).to_owned(),
            _ if by_hostname => self.hostname().to_owned(),
            _ => self.address.to_string(),
        }
    }

    /// A key of the metadata that load balancing reads.
    pub(crate) fn lb_metadata(&self, key: &str) -> Option<&Value> {
        self.metadata.as_ref()?.at("envoy.lb", &[key])
    }

    /// Coarse health.
    pub fn health(&self) -> Health {
        self.state.health()
    }

    /// Whether a flag is set.
    pub fn has_flag(&self, flag: HealthFlag) -> bool {
        self.state.flags() & flag as u32 != 0
    }

    /// Sets or clears a flag; whoever does rebuilds the cluster's snapshot afterwards (`Endpoints::refresh`). Returns
    /// whether it changed.
    pub fn set_flag(&self, flag: HealthFlag, on: bool) -> bool {
        self.state.set_flag(flag, on)
    }

    /// What outlier detection knows of it.
    pub(crate) fn monitor(&self) -> Option<&Arc<Monitor>> {
        self.state.monitor.as_ref()
    }

    /// Success rates in the last interval of outlier detection, of answers and of connecting; -1 is none.
    pub fn success_rates(&self) -> (f64, f64) {
        self.monitor().map_or((-1.0, -1.0), |monitor| monitor.success_rates())
    }

    /// Whether the host does not count for panic mode and priority loads.
    pub(crate) fn excluded(&self) -> bool {
        self.state.flags() & HealthFlag::EXCLUDED != 0
    }

    /// `healthy`, or the flags that are set, as `/clusters` shows them.
    pub fn health_flags(&self) -> String {
        let flags = self.state.flags();
        let text: String = HealthFlag::ALL
            .iter()
            .filter(|(flag, _)| flags & *flag as u32 != 0)
            .map(|(_, text)| *text)
            .collect();
        if text.is_empty() { "healthy".to_owned() } else { text }
    }

    /// The EDS health status, as `/clusters?format=json` shows it.
    pub fn eds_status(&self) -> core::HealthStatus {
        let flags = self.state.flags();
        if flags & HealthFlag::EdsStatusDraining as u32 != 0 {
            core::HealthStatus::Draining
        } else if flags & HealthFlag::FailedEdsHealth as u32 != 0 {
            core::HealthStatus::Unhealthy
        } else if flags & HealthFlag::DegradedEdsHealth as u32 != 0 {
            core::HealthStatus::Degraded
        } else {
            core::HealthStatus::Healthy
        }
    }

    /// Requests in flight over all workers.
    pub fn active_requests(&self) -> u64 {
        self.state.counts.rq_active.load(Ordering::Relaxed)
    }

    /// Connections open over all workers.
    pub fn active_connections(&self) -> u64 {
        self.state.counts.cx_active.load(Ordering::Relaxed).into()
    }

    /// All counts.
    pub fn counts(&self) -> HostCounts {
        let counts = &self.state.counts;
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        HostCounts {
            cx_total: of(&counts.cx_total),
            cx_active: counts.cx_active.load(Ordering::Relaxed).into(),
            rq_pending_active: counts.rq_pending_active.load(Ordering::Relaxed).into(),
            cx_connect_fail: of(&counts.cx_connect_fail),
            rq_total: of(&counts.rq_total),
            rq_active: of(&counts.rq_active),
            rq_success: of(&counts.rq_success),
            rq_error: of(&counts.rq_error),
            rq_timeout: of(&counts.rq_timeout),
        }
    }

    /// Counts a connection that could not be made.
    pub fn connect_failed(&self) {
        add(&self.state.counts.cx_connect_fail);
    }

    /// How long the host has been warming up.
    pub(crate) fn ramp(&self, now_ms: u64) -> Duration {
        Duration::from_millis(now_ms.saturating_sub(self.state.ramp_start_ms.load(Ordering::Relaxed)))
    }
}

impl HostState {
    /// The state of an endpoint that is seen for the first time.
    pub(crate) fn new(now: Instant, monitor: Option<Arc<Monitor>>) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let ejected = monitor.as_ref().is_some_and(|monitor| monitor.is_ejected());
        Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            health: AtomicU32::new(if ejected { HealthFlag::FailedOutlierCheck as u32 } else { 0 }),
            ramp_start_ms: AtomicU64::new(clock_ms(now)),
            monitor,
            line: Line::default(),
            counts: Counts::default(),
        })
    }

    pub(crate) fn flags(&self) -> u32 {
        self.health.load(Ordering::Relaxed)
    }

    fn health(&self) -> Health {
        let flags = self.flags();
        if flags & HealthFlag::UNHEALTHY != 0 {
            Health::Unhealthy
        } else if flags & HealthFlag::DEGRADED != 0 {
            Health::Degraded
        } else {
            Health::Healthy
        }
    }

    fn set_flag(&self, flag: HealthFlag, on: bool) -> bool {
        let bit = flag as u32;
        let before = if on {
            self.health.fetch_or(bit, Ordering::Relaxed)
        } else {
            self.health.fetch_and(!bit, Ordering::Relaxed)
        };
        (before & bit != 0) != on
    }

    /// Sets and clears flags; a host that becomes healthy again starts slowly.
    pub(crate) fn change(&self, set: u32, clear: u32, now: Instant) {
        let before = self.health();
        self.health.fetch_or(set, Ordering::Relaxed);
        self.health.fetch_and(!clear, Ordering::Relaxed);
        if before == Health::Unhealthy && self.health() != Health::Unhealthy {
            self.ramp_start_ms.store(clock_ms(now), Ordering::Relaxed);
        }
    }

    /// Puts the EDS health status in force; a host that becomes healthy again starts slowly.
    pub(crate) fn set_eds_status(&self, status: core::HealthStatus, now: Instant) {
        let flags = match status {
            core::HealthStatus::Unhealthy | core::HealthStatus::Timeout => HealthFlag::FailedEdsHealth as u32,
            core::HealthStatus::Draining => HealthFlag::EdsStatusDraining as u32,
            core::HealthStatus::Degraded => HealthFlag::DegradedEdsHealth as u32,
            core::HealthStatus::Unknown | core::HealthStatus::Healthy => 0,
        };
        let before = self.health();
        // Only the main thread changes the EDS bits, so that replacing them in two steps loses nothing.
        self.health.fetch_and(!(HealthFlag::EDS & !flags), Ordering::Relaxed);
        self.health.fetch_or(flags, Ordering::Relaxed);
        if before == Health::Unhealthy && self.health() == Health::Healthy {
            self.ramp_start_ms.store(clock_ms(now), Ordering::Relaxed);
        }
    }
}

impl ActiveRequest {
    /// The host.
    pub fn host(&self) -> &Rc<HostRef> {
        &self.0
    }

    /// Ends the request.
    pub fn finish(self, outcome: Outcome) {
        let counts = &self.0.state.counts;
        match outcome {
            Outcome::Success => add(&counts.rq_success),
            Outcome::Error => add(&counts.rq_error),
            Outcome::Timeout => {
                add(&counts.rq_timeout);
                add(&counts.rq_error);
            }
            Outcome::Cancelled => {}
        }
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.0.state.counts.rq_active.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for PendingRequest {
    fn drop(&mut self) {
        self.0.state.counts.rq_pending_active.fetch_sub(1, Ordering::Relaxed);
    }
}

impl ActiveConnection {
    /// The host.
    pub fn host(&self) -> &Rc<HostRef> {
        &self.0
    }
}

impl Drop for ActiveConnection {
    fn drop(&mut self) {
        self.0.state.counts.cx_active.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Locality {
    /// Compiles the protobuf form.
    pub fn from_proto(proto: &core::Locality) -> Self {
        Self {
            region: proto.region.as_str().into(),
            zone: proto.zone.as_str().into(),
            sub_zone: proto.sub_zone.as_str().into(),
        }
    }

    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        self.region.is_empty() && self.zone.is_empty() && self.sub_zone.is_empty()
    }
}

impl HostRef {
    /// Counts a request that is being sent to the host.
    pub fn begin_request(self: &Rc<Self>) -> ActiveRequest {
        add(&self.state.counts.rq_total);
        add(&self.state.counts.rq_active);
        ActiveRequest(Rc::clone(self))
    }

    /// Counts a request that waits for a connection.
    pub fn begin_pending(self: &Rc<Self>) -> PendingRequest {
        self.state.counts.rq_pending_active.fetch_add(1, Ordering::Relaxed);
        PendingRequest(Rc::clone(self))
    }

    /// Counts a connection that is being made.
    pub fn begin_connection(self: &Rc<Self>) -> ActiveConnection {
        add(&self.state.counts.cx_total);
        self.state.counts.cx_active.fetch_add(1, Ordering::SeqCst);
        ActiveConnection(Rc::clone(self))
    }

    /// Counts a connection only while there are fewer than `max` (`per_host_thresholds`).
    pub fn try_begin_connection(self: &Rc<Self>, max: u32) -> Option<ActiveConnection> {
        let active = &self.state.counts.cx_active;
        active
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| (count < max).then_some(count + 1))
            .ok()?;
        add(&self.state.counts.cx_total);
        Some(ActiveConnection(Rc::clone(self)))
    }

    /// A place among those who wait until a connection to the host ends (`per_host_thresholds`).
    pub fn stand_in_line(&self) -> Place {
        self.state.line.stand()
    }

    /// Whether somebody waits so: idle connections to the host are in their way.
    pub fn are_connections_wanted(&self) -> bool {
        !self.state.line.is_empty()
    }

    /// A connection to the host has ended.
    pub fn connection_ended(&self) {
        self.state.line.call();
    }
}

impl HostView for HostRef {
    fn address(&self) -> &Address {
        &self.0.address
    }

    fn hostname(&self) -> &str {
        self.0.hostname()
    }

    fn metadata(&self) -> Option<&Metadata> {
        self.0.metadata()
    }
}

impl Deref for HostRef {
    type Target = Arc<Host>;

    fn deref(&self) -> &Arc<Host> {
        &self.0
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host")
            .field("id", &self.state.id)
            .field("address", &self.address)
            .field("health", &self.health())
            .field("weight", &self.weight)
            .field("priority", &self.priority)
            .finish_non_exhaustive()
    }
}

/// Milliseconds since the first call in this process, so that an instant fits an atomic.
pub(crate) fn clock_ms(now: Instant) -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let start = *START.get_or_init(|| now);
    u64::try_from(now.saturating_duration_since(start).as_millis()).unwrap_or(u64::MAX)
}

fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

/// A flag that is written only when it changes, for "was used lately" marks on the request path.
#[derive(Debug, Default)]
pub(crate) struct UsedMark(AtomicBool);

impl UsedMark {
    pub(crate) fn set(&self) {
        if !self.0.load(Ordering::Relaxed) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    pub(crate) fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}
