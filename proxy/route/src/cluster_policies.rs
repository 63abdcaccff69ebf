//! Policies that a cluster has for the requests to it, whatever route they came by.

use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use waystation_schema::{At, ConfigError};

use crate::cluster::Cluster;
use crate::hash::HashPolicy;
use crate::policy::MirrorPolicy;
use crate::retry::RetryPolicy;
use crate::table::{CompileContext, Compiler};

/// The policies of a cluster's `HttpProtocolOptions`. Each that is there takes the place of the route's.
#[derive(Debug)]
pub struct ClusterPolicies {
    /// `retry_policy`; the timeouts of a try stay the route's, as with Envoy.
    pub retry: Option<RetryPolicy>,
    /// `hash_policy`: for the choice of the host; that of a weighted cluster goes by the route's.
    pub hash: Box<[HashPolicy]>,
    /// `request_mirror_policies`.
    pub mirrors: Box<[MirrorPolicy]>,
}

impl ClusterPolicies {
    /// Compiles the policies; nothing when the cluster has none.
    ///
    /// # Errors
    /// When a field is invalid, or set but not supported; the path starts below the options.
    pub fn compile(
        proto: &HttpProtocolOptions,
        cx: &CompileContext<'_>,
    ) -> Result<Option<Self>, ConfigError> {
        let HttpProtocolOptions { retry_policy, hash_policy, request_mirror_policies, .. } = proto;
        if retry_policy.is_none() && hash_policy.is_empty() && request_mirror_policies.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self {
            retry: retry_policy
                .as_ref()
                .map(|policy| RetryPolicy::compile(policy).at(|| "retry_policy"))
                .transpose()?,
            hash: HashPolicy::compile_all(hash_policy)?,
            mirrors: MirrorPolicy::compile_all(request_mirror_policies, &mut Compiler::new(cx))?,
        }))
    }

    /// The policies of a compiled cluster.
    #[inline]
    pub fn of(cluster: &Cluster) -> Option<&Self> {
        cluster.route_policies.as_deref()?.downcast_ref()
    }
}
