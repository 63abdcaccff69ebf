//! From the shorthand of a case file to a whole bootstrap.

use serde_json::{Map, Value, json};

use crate::case::{CaseFile, Kind};

/// The access log line of every HTTP listener.
const LOG: &str = "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% route=%ROUTE_NAME% \
cluster=%UPSTREAM_CLUSTER% %PROTOCOL% host=%UPSTREAM_HOST% attempts=%UPSTREAM_REQUEST_ATTEMPT_COUNT% \
rx=%BYTES_RECEIVED% tx=%BYTES_SENT% failure=%UPSTREAM_TRANSPORT_FAILURE_REASON% \
end=%CONNECTION_TERMINATION_DETAILS%\n";

const HCM: &str =
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
const FILE_LOG: &str = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog";
const DOWNSTREAM_TLS: &str =
    "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";
const HTTP_OPTIONS: &str = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// True when the file describes a proxy at all; a file of `exec` steps does not.
pub(crate) fn wanted(file: &CaseFile) -> bool {
    file.config.is_some() || !file.http.is_empty() || !file.listeners.is_empty() || !file.bootstrap.is_null()
}

/// The bootstrap, still with its `{{...}}`.
pub(crate) fn build(file: &CaseFile) -> Value {
    let mut listeners: Vec<Value> =
        file.http.iter().map(|(name, spec)| http_listener(file, name, spec)).collect();
    for listener in &file.listeners {
        let mut listener = listener.clone();
        if listener.get("address").is_none() {
            listener["address"] = local(json!(0));
        }
        listeners.push(listener);
    }
    let mut clusters: Vec<Value> = file
        .upstreams
        .iter()
        .filter(|(_, spec)| spec.cluster != Value::Bool(false))
        .map(|(name, spec)| cluster(name, spec.kind, &spec.cluster))
        .collect();
    clusters.extend(file.clusters.iter().cloned());
    if file.xds {
        let place = json!({"endpoint": {"address": local(json!("{{port:xds}}"))}});
        let over = json!({"load_assignment": {"endpoints": [{"lb_endpoints": [place]}]}});
        clusters.push(cluster("xds", Kind::H2, &over));
    }
    let mut bootstrap = json!({
        "node": {"id": "rig-node", "cluster": "rig-cluster"},
        "admin": {"address": local(json!(0))},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    });
    merge(&mut bootstrap, &file.bootstrap);
    bootstrap
}

fn local(port: Value) -> Value {
    json!({"socket_address": {"address": "127.0.0.1", "port_value": port}})
}

/// A STATIC cluster with one endpoint, the upstream of the same name.
fn cluster(name: &str, kind: Kind, more: &Value) -> Value {
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "2s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint(name)]}]},
    });
    if matches!(kind, Kind::H2 | Kind::Als) {
        cluster["typed_extension_protocol_options"] = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions":
                {"@type": HTTP_OPTIONS, "explicit_http_config": {"http2_protocol_options": {}}},
        });
    }
    merge(&mut cluster, more);
    cluster
}

fn endpoint(name: &str) -> Value {
    json!({"endpoint": {"address": local(Value::String(format!("{{{{upstream:{name}}}}}")))}})
}

fn http_listener(file: &CaseFile, name: &str, spec: &Value) -> Value {
    let mut spec = spec.clone();
    let mut take = |key: &str| spec.as_object_mut().and_then(|m| m.remove(key));
    let over = take("listener");
    let tls = take("tls");
    let vhosts = take("virtual_hosts").or_else(|| take("routes").map(one_host)).unwrap_or_else(|| {
        if file.virtual_hosts.is_null() { one_host(file.routes.clone()) } else { file.virtual_hosts.clone() }
    });
    let route_config = take("route_config");
    let mut hcm = json!({
        "@type": HCM,
        "stat_prefix": name,
        "access_log": [{"name": "file", "typed_config": {
            "@type": FILE_LOG, "path": "{{tmp}}/access.log",
            "log_format": {"text_format_source": {"inline_string":
                file.log_format.as_deref().map_or_else(|| LOG.to_owned(), |f| format!("{f}\n"))}},
        }}],
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": ROUTER}}],
    });
    merge(&mut hcm, &file.hcm);
    merge(&mut hcm, &spec);
    if hcm.get("rds").is_none() && hcm.get("scoped_routes").is_none() {
        let mut config = json!({"name": "local", "virtual_hosts": vhosts});
        if let Some(more) = file.hcm.get("route_config") {
            merge(&mut config, more);
        }
        if let Some(more) = route_config {
            merge(&mut config, &more);
        }
        hcm["route_config"] = config;
    }
    let mut chain =
        json!({"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": hcm}]});
    if let Some(tls) = tls {
        let mut context = json!({"@type": DOWNSTREAM_TLS});
        merge(&mut context, &tls);
        chain["transport_socket"] = json!({"name": "envoy.transport_sockets.tls", "typed_config": context});
    }
    let mut listener = json!({"name": name, "address": local(json!(0)), "filter_chains": [chain]});
    if let Some(over) = over {
        merge(&mut listener, &over);
    }
    listener
}

fn one_host(routes: Value) -> Value {
    json!([{"name": "all", "domains": ["*"], "routes": if routes.is_null() { json!([]) } else { routes }}])
}

/// Maps merge, everything else is replaced; null removes.
pub(crate) fn merge(into: &mut Value, over: &Value) {
    match (into, over) {
        (_, Value::Null) => {}
        (Value::Object(into), Value::Object(over)) => {
            for (key, value) in over {
                if value.is_null() {
                    into.remove(key);
                } else if let Some(slot) = into.get_mut(key) {
                    merge(slot, value);
                } else {
                    into.insert(key.clone(), clean(value));
                }
            }
        }
        (into, over) => *into = clean(over),
    }
}

/// A null that has nothing to remove disappears.
fn clean(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.iter()
                .filter(|(_, v)| !v.is_null())
                .map(|(k, v)| (k.clone(), clean(v)))
                .collect::<Map<_, _>>(),
        ),
        other => other.clone(),
    }
}
