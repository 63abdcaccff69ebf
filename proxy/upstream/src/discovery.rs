//! Where endpoints come from: assignments (EDS and static), DNS, and the original destination.

mod assignment;
mod dns;
mod original_dst;
mod resolver;

pub use assignment::Assignment;
pub(crate) use assignment::{EndpointSpec, LocalityAssignment};
pub use dns::{DnsDiscovery, DnsFailure, DnsRecord, DnsSettings, LookupFamily, Query, ResolverSettings};
pub use original_dst::OriginalDst;
pub(crate) use original_dst::OriginalDstCache;
pub use resolver::{HickoryResolver, Resolve, Resolver, drive};
