//! The validating walk: rules in Envoy's own words, unknown and deprecated fields, the ledger.

use waystation_schema::{
    ConfigError, Finding, Message, Place, Policy, TextOptions, Visitor, check, json_to_wire, merge, walk,
    yaml_to_wire,
};

fn message(name: &str) -> Message {
    Message::find(name).unwrap_or_else(|| panic!("no message {name}"))
}

/// The broken rules in a message, with their paths, and nothing else.
struct Constraints(Vec<String>);

impl Visitor for Constraints {
    fn found(&mut self, place: &Place<'_>, finding: &Finding<'_>) -> Result<(), ConfigError> {
        if let Finding::Constraint(violation) = finding {
            self.0.push(place.error(violation.to_string()).to_string());
        }
        Ok(())
    }
}

fn constraints(message: Message, wire: &[u8]) -> Vec<String> {
    let mut found = Constraints(Vec::new());
    walk(message, wire, &mut found).expect("the visitor lets everything pass");
    found.0
}

#[test]
fn constraints_read_as_in_envoy() {
    let hcm = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    let in_hcm = |fields: &str| {
        format!(
            r#"{{"static_resources":{{"listeners":[{{"name":"l","address":{{"socket_address":{{"address":"::1",
            "port_value":0}}}},"filter_chains":[{{"filters":[{{"name":"h","typed_config":{{"@type":"{hcm}",
            {fields}}}}}]}}]}}]}}}}"#
        )
    };
    let in_cluster =
        |fields: &str| format!(r#"{{"static_resources":{{"clusters":[{{"name":"a",{fields}}}]}}}}"#);
    let in_virtual_host = |fields: &str| {
        in_hcm(&format!(
            r#""stat_prefix":"x","route_config":{{"virtual_hosts":[{{"name":"v","domains":["*"],{fields}}}]}}"#
        ))
    };
    let cluster = "static_resources.clusters[a]";
    let filter = "static_resources.listeners[l].filter_chains[0].filters[h].typed_config";
    let host = format!("{filter}.route_config.virtual_hosts[v]");

    // The text in parentheses is the end of what `envoy --mode validate` says of the same configuration.
    let cases = [
        (
            r#"{"static_resources":{"clusters":[{}]}}"#.to_owned(),
            "static_resources.clusters[0].name".to_owned(),
            "ClusterValidationError.Name: value length must be at least 1 characters",
        ),
        (
            in_cluster(r#""type":77"#),
            format!("{cluster}.type"),
            "ClusterValidationError.Type: value must be one of the defined enum values",
        ),
        (
            in_cluster(r#""connect_timeout":"0s""#),
            format!("{cluster}.connect_timeout"),
            "ClusterValidationError.ConnectTimeout: value must be greater than 0s",
        ),
        (
            in_cluster(r#""load_assignment":{}"#),
            format!("{cluster}.load_assignment.cluster_name"),
            "ClusterLoadAssignmentValidationError.ClusterName: value length must be at least 1 characters",
        ),
        (
            in_cluster(r#""load_assignment":{"cluster_name":"a","endpoints":[{"priority":200}]}"#),
            format!("{cluster}.load_assignment.endpoints[0].priority"),
            "LocalityLbEndpointsValidationError.Priority: value must be less than or equal to 128",
        ),
        (
            in_cluster(r#""transport_socket_matches":[{"name":""}]"#),
            format!("{cluster}.transport_socket_matches[0].name"),
            "TransportSocketMatchValidationError.Name: value length must be at least 1 characters",
        ),
        (
            in_cluster(r#""lb_subset_config":{"subset_selectors":[{"keys":["a"],"fallback_policy":9}]}"#),
            format!("{cluster}.lb_subset_config.subset_selectors[0].fallback_policy"),
            "LbSubsetSelectorValidationError.FallbackPolicy: value must be one of the defined enum values",
        ),
        (
            in_hcm(r#""stat_prefix":"","route_config":{}"#),
            format!("{filter}.stat_prefix"),
            "HttpConnectionManagerValidationError.StatPrefix: value length must be at least 1 characters",
        ),
        (
            in_hcm(r#""stat_prefix":"x""#),
            filter.to_owned(),
            "field: \"route_specifier\", reason: is required",
        ),
        (
            in_hcm(r#""stat_prefix":"x","route_config":{},"max_request_headers_kb":9000"#),
            format!("{filter}.max_request_headers_kb"),
            "HttpConnectionManagerValidationError.MaxRequestHeadersKb: value must be inside range (0, 8192]",
        ),
        (
            in_hcm(
                r#""stat_prefix":"x","route_config":{},"http2_protocol_options":{"max_concurrent_streams":0}"#,
            ),
            format!("{filter}.http2_protocol_options.max_concurrent_streams"),
            "Http2ProtocolOptionsValidationError.MaxConcurrentStreams: value must be inside range [1, 2147483647]",
        ),
        (
            in_hcm(r#""stat_prefix":"x","route_config":{"virtual_hosts":[{"name":"v"}]}"#),
            format!("{host}.domains"),
            "VirtualHostValidationError.Domains: value must contain at least 1 item(s)",
        ),
        (
            in_virtual_host(r#""routes":[{"match":{},"route":{"cluster":"a"}}]"#),
            format!("{host}.routes[0].match"),
            "field: \"path_specifier\", reason: is required",
        ),
        (
            in_virtual_host(r#""routes":[{"match":{"prefix":"/"}}]"#),
            format!("{host}.routes[0]"),
            "field: \"action\", reason: is required",
        ),
        (
            in_virtual_host(r#""routes":[{"direct_response":{"status":200}}]"#),
            format!("{host}.routes[0].match"),
            "RouteValidationError.Match: value is required",
        ),
        (
            in_virtual_host(r#""routes":[{"match":{"prefix":"/"},"direct_response":{"status":99}}]"#),
            format!("{host}.routes[0].direct_response.status"),
            "DirectResponseActionValidationError.Status: value must be inside range [200, 600)",
        ),
        (
            in_virtual_host(
                r#""routes":[{"match":{"path_separated_prefix":"a/"},"direct_response":{"status":200}}]"#,
            ),
            format!("{host}.routes[0].match.path_separated_prefix"),
            "RouteMatchValidationError.PathSeparatedPrefix: value does not match regex pattern \"^[^?#]+[^?#/]$\"",
        ),
        (
            in_virtual_host(
                r#""routes":[{"match":{"prefix":"/"},"direct_response":{"status":200},"response_headers_to_remove":["ok","a\nb"]}]"#,
            ),
            format!("{host}.routes[0].response_headers_to_remove[1]"),
            "RouteValidationError.ResponseHeadersToRemove[1]: value does not match regex pattern \"^[^\\x00\\n\\r]*$\"",
        ),
        (
            in_virtual_host(r#""request_headers_to_add":[{"header":{"key":""}}]"#),
            format!("{host}.request_headers_to_add[0].header.key"),
            "HeaderValueValidationError.Key: value length must be at least 1 characters",
        ),
        (
            in_virtual_host(r#""retry_policy":{"retry_back_off":{}}"#),
            format!("{host}.retry_policy.retry_back_off.base_interval"),
            "RetryBackOffValidationError.BaseInterval: value is required",
        ),
        (
            r#"{"stats_flush_interval":"301s"}"#.to_owned(),
            "stats_flush_interval".to_owned(),
            "BootstrapValidationError.StatsFlushInterval: value must be inside range [1ms, 5m0s)",
        ),
        (
            r#"{"stats_flush_on_admin":false}"#.to_owned(),
            "stats_flush_on_admin".to_owned(),
            "BootstrapValidationError.StatsFlushOnAdmin: value must equal true",
        ),
        (
            in_cluster(
                r#""transport_socket":{"name":"t","typed_config":{"@type":"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context":{"validation_context":{"match_typed_subject_alt_names":[{"matcher":{"exact":"a"}}]}}}}"#,
            ),
            format!(
                "{cluster}.transport_socket.typed_config.common_tls_context.validation_context\
                 .match_typed_subject_alt_names[0].san_type"
            ),
            "SubjectAltNameMatcherValidationError.SanType: value must not be in list [SAN_TYPE_UNSPECIFIED]",
        ),
        (
            r#"{"layered_runtime":{"layers":[{"name":"a"}]}}"#.to_owned(),
            "layered_runtime.layers[a]".to_owned(),
            "field: \"layer_specifier\", reason: is required",
        ),
    ];
    let bootstrap = message("envoy.config.bootstrap.v3.Bootstrap");
    for (text, path, expected) in cases {
        let wire = json_to_wire(bootstrap, &text, TextOptions::default())
            .unwrap_or_else(|error| panic!("{text}: {error}"))
            .wire;
        let expected = format!("{path}: Proto constraint validation failed ({expected})");
        assert_eq!(constraints(bootstrap, &wire), [expected], "{text}");
    }
}

#[test]
fn a_realistic_configuration_passes() {
    let bootstrap = message("envoy.config.bootstrap.v3.Bootstrap");
    let text = include_str!("../benches/bootstrap.yaml");
    let encoded =
        yaml_to_wire(bootstrap, text, TextOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let report = check(bootstrap, &encoded.wire, Policy::default()).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(report, waystation_schema::Report::default());
}

#[test]
fn policies_decide_over_the_unknown_and_the_deprecated() {
    let bootstrap = message("envoy.config.bootstrap.v3.Bootstrap");
    // Field 15000 of the bootstrap, and of a cluster.
    let unknown = [0xc0, 0xa9, 0x07, 0x01];
    let mut wire = json_to_wire(
        bootstrap,
        r#"{"static_resources":{"clusters":[{"name":"a"}]}}"#,
        TextOptions::default(),
    )
    .unwrap()
    .wire;
    wire.extend(unknown);
    let error = check(bootstrap, &wire, Policy::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "#15000: envoy.config.bootstrap.v3.Bootstrap has no field with number 15000"
    );
    let report = check(bootstrap, &wire, Policy { allow_unknown: true, ..Policy::default() }).unwrap();
    assert_eq!(report.unknown.len(), 1);

    let cluster = message("envoy.config.cluster.v3.Cluster");
    let wire = json_to_wire(
        cluster,
        r#"{"name":"a","max_requests_per_connection":1,"typed_extension_protocol_options":{"x":{"@type":"a/envoy.config.core.v3.Node"}}}"#,
        TextOptions::default(),
    )
    .unwrap()
    .wire;
    let error = check(cluster, &wire, Policy::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "typed_extension_protocol_options[x]: envoy.config.core.v3.Node is not accepted here"
    );

    let wire =
        json_to_wire(cluster, r#"{"name":"a","max_requests_per_connection":1}"#, TextOptions::default());
    let report = check(cluster, &wire.unwrap().wire, Policy::default()).unwrap();
    assert_eq!(
        report.deprecated,
        ["max_requests_per_connection: Using deprecated option \
             'envoy.config.cluster.v3.Cluster.max_requests_per_connection'"]
    );
}

/// Where access is decided, a part that is not known may be the part that keeps somebody out.
#[test]
fn what_decides_over_access_is_understood_in_full_or_refused() {
    let allow_unknown = Policy { allow_unknown: true, ..Policy::default() };
    let listener = message("envoy.config.listener.v3.Listener");
    let text = |policy: &str| {
        format!(
            r#"{{"name":"l","filter_chains":[{{"filters":[{{"name":"r","typed_config":{{
                "@type":"a/envoy.extensions.filters.network.rbac.v3.RBAC","stat_prefix":"s",
                "rules":{{"policies":{{"p":{policy}}}}}}}}}]}}]}}"#
        )
    };
    for (policy, field) in [
        (r#"{"permissions":[{"any":true}],"principals":[{"any":true}],"unless":{}}"#, "unless"),
        (r#"{"permissions":[{"not_rule":{"any":true,"only":1}}],"principals":[{"any":true}]}"#, "only"),
        (r#"{"permissions":[{"any":true}],"principals":[{"and_ids":{"ids":[{"any":true,"if":1}]}}]}"#, "if"),
    ] {
        let options = TextOptions { allow_unknown: true };
        let error = json_to_wire(listener, &text(policy), options).unwrap_err().to_string();
        assert!(error.contains(&format!("{field}: envoy.config.rbac.v3.")), "{error}");
    }

    let policy = message("envoy.config.rbac.v3.Policy");
    let known = json_to_wire(
        policy,
        r#"{"permissions":[{"any":true}],"principals":[{"any":true}]}"#,
        TextOptions::default(),
    );
    let mut wire = known.unwrap().wire;
    assert!(check(policy, &wire, allow_unknown).is_ok());
    // Field 200, a varint.
    wire.extend([0xc0, 0x0c, 1]);
    let error = check(policy, &wire, allow_unknown).unwrap_err();
    assert_eq!(error.to_string(), "#200: envoy.config.rbac.v3.Policy has no field with number 200");
}

#[test]
fn the_ledger_refuses_and_ignores() {
    let bootstrap = message("envoy.config.bootstrap.v3.Bootstrap");
    let policy = Policy::default();
    let checked = |text: &str| {
        let wire =
            json_to_wire(bootstrap, text, TextOptions::default()).expect("the test is well-formed").wire;
        check(bootstrap, &wire, policy)
    };
    let error = checked(r#"{"fatal_actions":[{}]}"#).unwrap_err();
    assert!(error.to_string().starts_with("fatal_actions[0]: not supported: "), "{error}");
    let report = checked(r#"{"watchdogs":{"main_thread_watchdog":{}}}"#).unwrap();
    assert_eq!(report.ignored.len(), 1);
    // What is ignored is still checked for sense.
    let error = checked(r#"{"watchdogs":{"main_thread_watchdog":{"multikill_threshold":{"value":101}}}}"#)
        .unwrap_err();
    assert!(
        error.reason().contains("PercentValidationError.Value: value must be inside range [0, 100]"),
        "{error}"
    );
    // A type that the ledger refuses.
    let text = r#"{"static_resources":{"listeners":[{"name":"l","filter_chains":[{"filters":[{"name":"f",
        "typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.network.redis_proxy.v3.RedisProxy"}}]}]}]}}"#;
    let error = checked(text).unwrap_err();
    assert!(
        error.to_string().starts_with(
            "static_resources.listeners[l].filter_chains[0].filters[f].typed_config: \
             envoy.extensions.filters.network.redis_proxy.v3.RedisProxy is not supported: "
        ),
        "{error}"
    );
}

#[test]
fn typed_structs_are_walked_as_their_message() {
    let any = message("google.protobuf.Any");
    let text = r#"{"@type":"a/xds.type.v3.TypedStruct","type_url":"a/envoy.config.cluster.v3.Cluster",
        "value":{"name":"a","connect_timeout":"0s"}}"#;
    let wire = json_to_wire(any, text, TextOptions::default()).unwrap().wire;
    let error = check(any, &wire, Policy::default()).unwrap_err();
    assert!(error.to_string().starts_with("connect_timeout: Proto constraint"), "{error}");
    let text = text.replace("\"0s\"", "0");
    let wire = json_to_wire(any, &text, TextOptions::default()).unwrap().wire;
    let error = check(any, &wire, Policy::default()).unwrap_err();
    assert_eq!(error.to_string(), "connect_timeout: expected a duration in quotes, found the number 0");
}

#[test]
fn malformed_bytes_are_found_where_they_are() {
    let cluster = message("envoy.config.cluster.v3.Cluster");
    let cases: [(&[u8], &str); 6] = [
        (&[0x0a], "not a protobuf message: the bytes end inside a value"),
        (&[0x0a, 0x02, b'a'], "not a protobuf message: the bytes end inside a value"),
        (&[0x08, 0x01], "not a protobuf message: the wire type does not fit the field"),
        (&[0x0a, 0x01, 0xff], "name: not a protobuf message: a string is not UTF-8"),
        (
            &[0x0a, 0x01, b'a', 0x22, 0x01, 0x08],
            "connect_timeout: not a protobuf message: the bytes end inside a value",
        ),
        (&[0x07], "not a protobuf message: a field tag is invalid"),
    ];
    for (wire, expected) in cases {
        assert_eq!(check(cluster, wire, Policy::default()).unwrap_err().to_string(), expected, "{wire:?}");
    }
}

#[test]
fn parts_of_one_message_are_judged_together() {
    let address = message("envoy.config.core.v3.Address");
    let part =
        |text: &str| json_to_wire(address, text, TextOptions::default()).expect("it is well-formed").wire;
    let base = part(r#"{"socket_address":{"address":"::1","port_value":1}}"#);
    let overlay = part(r#"{"socket_address":{"port_value":2}}"#);
    assert!(check(address, &overlay, Policy::default()).is_err(), "alone it has no address");
    let both = [base.clone(), overlay.clone()].concat();
    check(address, &both, Policy::default()).unwrap();
    let merged = merge(address, &base, &overlay).unwrap();
    assert_eq!(merged, part(r#"{"socket_address":{"address":"::1","port_value":2}}"#));
    // A later member of a oneof takes its place.
    let pipe = part(r#"{"pipe":{"path":"/x"}}"#);
    assert_eq!(merge(address, &base, &pipe).unwrap(), pipe);
}

#[test]
fn merging_follows_protobuf() {
    let bootstrap = message("envoy.config.bootstrap.v3.Bootstrap");
    let wire =
        |text: &str| json_to_wire(bootstrap, text, TextOptions::default()).expect("it is well-formed").wire;
    let base = wire(
        r#"{"node":{"id":"a","cluster":"c","metadata":{"x":1,"y":2}},"static_resources":{"clusters":[{"name":"one"}]}}"#,
    );
    let overlay = wire(
        r#"{"node":{"id":"b","metadata":{"y":3,"z":4}},"static_resources":{"clusters":[{"name":"two"}]}}"#,
    );
    let merged = merge(bootstrap, &base, &overlay).unwrap();
    let expected = wire(
        r#"{"node":{"id":"b","cluster":"c","metadata":{"x":1,"y":3,"z":4}},"static_resources":{"clusters":[{"name":"one"},{"name":"two"}]}}"#,
    );
    assert_eq!(merged, expected);
}
