//! JSON and YAML as Envoy takes them, and every kind of error with its place.

use waystation_schema::{
    Encoded, Format, JsonStyle, Message, TextOptions, json_to_wire, resolve_typed_structs, to_wire,
    typed_struct_to_wire, wire_to_json, yaml_to_wire,
};

fn message(name: &str) -> Message {
    Message::find(name).unwrap_or_else(|| panic!("no message {name}"))
}

fn to_json(message: Message, encoded: &Encoded) -> String {
    let mut out = String::new();
    wire_to_json(message, &encoded.wire, &mut out, JsonStyle { proto_names: true, ..JsonStyle::default() })
        .expect("what was just written reads");
    out
}

const BOOTSTRAP: &str = "envoy.config.bootstrap.v3.Bootstrap";
const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";
const METADATA: &str = "envoy.config.core.v3.Metadata";

#[test]
fn what_envoy_accepts_is_accepted() {
    // Message, text in JSON, the same in canonical form; each seen to pass `envoy --mode validate`.
    let cases = [
        (CLUSTER, r#"{"name":"a","connectTimeout":"1.5s"}"#, r#"{"name":"a","connect_timeout":"1.500s"}"#),
        (CLUSTER, r#"{"type":"static"}"#, r#"{"type":"STATIC"}"#),
        (CLUSTER, r#"{"type":"strict-dns"}"#, r#"{"type":"STRICT_DNS"}"#),
        (CLUSTER, r#"{"type":3}"#, r#"{"type":"EDS"}"#),
        (CLUSTER, r#"{"type":"3"}"#, r#"{"type":"EDS"}"#),
        (CLUSTER, r#"{"type":null}"#, "{}"),
        (CLUSTER, r#"{"type":77}"#, r#"{"type":77}"#),
        (
            CLUSTER,
            r#"{"per_connection_buffer_limit_bytes":"12"}"#,
            r#"{"per_connection_buffer_limit_bytes":12}"#,
        ),
        (
            CLUSTER,
            r#"{"per_connection_buffer_limit_bytes":1.2e1}"#,
            r#"{"per_connection_buffer_limit_bytes":12}"#,
        ),
        (
            CLUSTER,
            r#"{"per_connection_buffer_limit_bytes":"12.0"}"#,
            r#"{"per_connection_buffer_limit_bytes":12}"#,
        ),
        (
            CLUSTER,
            r#"{"per_connection_buffer_limit_bytes":{"value":3}}"#,
            r#"{"per_connection_buffer_limit_bytes":3}"#,
        ),
        (CLUSTER, r#"{"respect_dns_ttl":"true"}"#, r#"{"respect_dns_ttl":true}"#),
        (CLUSTER, r#"{"ring_hash_lb_config":null,"maglev_lb_config":{}}"#, r#"{"maglev_lb_config":{}}"#),
        (CLUSTER, r#"{"health_checks":[null]}"#, "{}"),
        (
            CLUSTER,
            r#"{"typed_extension_protocol_options":{"a":{}}}"#,
            r#"{"typed_extension_protocol_options":{"a":{}}}"#,
        ),
        (METADATA, r#"{"filter_metadata":{"a":null}}"#, r#"{"filter_metadata":{"a":{}}}"#),
        (
            METADATA,
            r#"{"filter_metadata":{"a":{"n":null,"b":[true,1,"x",{}]}}}"#,
            r#"{"filter_metadata":{"a":{"n":null,"b":[true,1,"x",{}]}}}"#,
        ),
        (
            METADATA,
            r#"{"typed_filter_metadata":{"a":{"value":"1s","@type":"type.googleapis.com/google.protobuf.Duration"}}}"#,
            r#"{"typed_filter_metadata":{"a":{"@type":"type.googleapis.com/google.protobuf.Duration","value":"1s"}}}"#,
        ),
        (
            METADATA,
            r#"{"typed_filter_metadata":{"a":{"@type":"x/google.protobuf.Empty","value":{}}}}"#,
            r#"{"typed_filter_metadata":{"a":{"@type":"x/google.protobuf.Empty"}}}"#,
        ),
        ("google.protobuf.DoubleValue", r#""NaN""#, r#""NaN""#),
        ("google.protobuf.DoubleValue", r#""-Infinity""#, r#""-Infinity""#),
        ("google.protobuf.DoubleValue", r#""1e-3""#, "0.001"),
        ("google.protobuf.DoubleValue", "-0.0", "-0"),
        ("google.protobuf.BytesValue", r#""-_8""#, r#""+/8=""#),
        ("google.protobuf.BytesValue", r#""+/8=""#, r#""+/8=""#),
        ("google.protobuf.UInt64Value", r#""18446744073709551615""#, r#""18446744073709551615""#),
        ("google.protobuf.Int64Value", "-9223372036854775808", r#""-9223372036854775808""#),
        ("google.protobuf.FieldMask", r#""fooBar.b,c""#, r#""fooBar.b,c""#),
        ("google.protobuf.FieldMask", r#""""#, r#""""#),
        ("google.protobuf.Empty", "{}", "{}"),
        (
            "xds.type.v3.TypedStruct",
            r#"{"typeUrl":"a/b","value":{"x":1}}"#,
            r#"{"type_url":"a/b","value":{"x":1}}"#,
        ),
        (
            "udpa.type.v1.TypedStruct",
            r#"{"type_url":"a/b","value":{"x":1}}"#,
            r#"{"type_url":"a/b","value":{"x":1}}"#,
        ),
    ];
    for (name, text, expected) in cases {
        let message = message(name);
        let encoded = json_to_wire(message, text, TextOptions::default())
            .unwrap_or_else(|error| panic!("{name} {text}: {error}"));
        assert_eq!(to_json(message, &encoded), expected, "{name} {text}");
    }
}

#[test]
fn every_error_has_its_path_line_and_column() {
    let cases = [
        (CLUSTER, r#"{"nam":1}"#, "1:2 nam: envoy.config.cluster.v3.Cluster has no such field"),
        (CLUSTER, "{\"name\":\"a\",\n \"name\":\"b\"}", "2:2 name: the field is set twice"),
        (
            CLUSTER,
            "{\"respect_dns_ttl\":true,\n\n  \"respectDnsTtl\":true}",
            "3:3 respect_dns_ttl: the field is set twice",
        ),
        (
            CLUSTER,
            r#"{"ring_hash_lb_config":{},"maglev_lb_config":{}}"#,
            "1:27 maglev_lb_config: `ring_hash_lb_config` is set too, and only one of `lb_config` can be",
        ),
        (CLUSTER, r#"{"name":1}"#, "1:9 name: expected a string, found the number 1"),
        (CLUSTER, r#"{"name":true}"#, "1:9 name: expected a string, found the boolean true"),
        (
            CLUSTER,
            r#"{"type":"NO"}"#,
            "1:9 type: envoy.config.cluster.v3.Cluster.DiscoveryType has no value the string \"NO\"",
        ),
        (
            CLUSTER,
            r#"{"connect_timeout":1.5}"#,
            "1:20 connect_timeout: expected a duration in quotes, found the number 1.5",
        ),
        (
            CLUSTER,
            r#"{"connect_timeout":"1ms"}"#,
            "1:20 connect_timeout: a duration must be a number of seconds, as in 1.5s",
        ),
        (
            CLUSTER,
            r#"{"connect_timeout":"1"}"#,
            "1:20 connect_timeout: a duration must end with `s`, as in 1.5s",
        ),
        (
            CLUSTER,
            r#"{"connect_timeout":"1.0000000001s"}"#,
            "1:20 connect_timeout: a fraction has one to nine digits",
        ),
        (
            CLUSTER,
            r#"{"respect_dns_ttl":1}"#,
            "1:20 respect_dns_ttl: expected true or false, found the number 1",
        ),
        (
            CLUSTER,
            r#"{"per_connection_buffer_limit_bytes":12.5}"#,
            "1:38 per_connection_buffer_limit_bytes: expected an integer, found a fraction",
        ),
        (
            CLUSTER,
            r#"{"per_connection_buffer_limit_bytes":-1}"#,
            "1:38 per_connection_buffer_limit_bytes: -1 is out of range (0 to 4294967295)",
        ),
        (
            CLUSTER,
            r#"{"per_connection_buffer_limit_bytes":" 12"}"#,
            "1:38 per_connection_buffer_limit_bytes: expected an integer, found the string \" 12\"",
        ),
        (CLUSTER, r#"{"health_checks":{}}"#, "1:18 health_checks: expected a list, found an object"),
        (
            CLUSTER,
            r#"{"load_assignment":[]}"#,
            "1:20 load_assignment: expected an object (envoy.config.endpoint.v3.ClusterLoadAssignment), found a list",
        ),
        (
            CLUSTER,
            r#"{"load_assignment":{"endpoints":[{},{"priority":"x"}]}}"#,
            "1:49 load_assignment.endpoints[1].priority: expected an integer, found the string \"x\"",
        ),
        (
            CLUSTER,
            r#"{"typed_extension_protocol_options":{"a":{"@type":"type.googleapis.com/foo.Bar"}}}"#,
            "1:51 typed_extension_protocol_options[a].@type: unknown type \"type.googleapis.com/foo.Bar\"",
        ),
        (
            CLUSTER,
            r#"{"typed_extension_protocol_options":{"a":{"x":1}}}"#,
            "1:42 typed_extension_protocol_options[a]: an Any needs @type",
        ),
        (
            METADATA,
            r#"{"typed_filter_metadata":{"a":{"@type":"a/google.protobuf.Duration","x":1}}}"#,
            "1:69 typed_filter_metadata[a].x: in an Any, google.protobuf.Duration has only `value`",
        ),
        (
            METADATA,
            r#"{"filter_metadata":{"a":{"x":1,"x":2}}}"#,
            "1:32 filter_metadata[a].x: the key stands here twice",
        ),
        (
            METADATA,
            r#"{"filter_metadata":{"a":{},"a":{}}}"#,
            "1:28 filter_metadata[a]: the key stands here twice",
        ),
        (
            METADATA,
            r#"{"filter_metadata":{"a":{"x":1e999}}}"#,
            "1:30 filter_metadata[a].x: the number is out of the range of a double",
        ),
        ("google.protobuf.DoubleValue", r#""inf""#, "1:1 expected a number, found the string \"inf\""),
        ("google.protobuf.FloatValue", "1e39", "1:1 the number is out of the range of a float"),
        ("google.protobuf.BytesValue", r#""a*b""#, "1:1 expected base64"),
        ("google.protobuf.Timestamp", r#""2024-02-30T00:00:00Z""#, "1:1 the time does not exist"),
        ("google.protobuf.FieldMask", r#""a_b""#, "1:1 expected camelCase field paths separated by commas"),
        (
            BOOTSTRAP,
            "{\"static_resources\":{\"clusters\":[{\"name\":\"up\",\n\"connect_timeout\":\"x\"}]}}",
            "2:19 static_resources.clusters[up].connect_timeout: a duration must end with `s`, as in 1.5s",
        ),
        (BOOTSTRAP, "[]", "1:1 expected an object (envoy.config.bootstrap.v3.Bootstrap), found a list"),
        (BOOTSTRAP, "null", "1:1 expected an object (envoy.config.bootstrap.v3.Bootstrap), found null"),
        (BOOTSTRAP, "{} x", "1:4 unexpected text behind the document"),
    ];
    for (name, text, expected) in cases {
        let error = json_to_wire(message(name), text, TextOptions::default())
            .expect_err(&format!("{name} {text} must fail"));
        let found = format!("{}:{} {}", error.line(), error.column(), error.config_error());
        assert_eq!(found, expected, "{name} {text}");
    }
}

#[test]
fn yaml_errors_have_their_place_too() {
    let cases = [
        ("node:\n  id: 1\n", "2:7 node.id: expected a string, found the number 1"),
        ("node:\n  id: y\n", "2:7 node.id: expected a string, found the boolean true"),
        ("node: {id: !!str y}", "1:12 node.id: expected a string, found the boolean true"),
        ("node: {id: a, id: b}", "1:15 node.id: the field is set twice"),
        ("node:\n  <<: {id: a}\n", "2:3 node.<<: envoy.config.core.v3.Node has no such field"),
        ("node: {? [a] : b}", "1:10 a key must be a scalar"),
        ("a: 1\n---\nb: 1\n", "3:1 a second document in the same text"),
        ("1: 1\n", "1:1 1: envoy.config.bootstrap.v3.Bootstrap has no such field"),
        ("", "1:1 expected an object (envoy.config.bootstrap.v3.Bootstrap), found null"),
    ];
    for (text, expected) in cases {
        let error = yaml_to_wire(message(BOOTSTRAP), text, TextOptions::default())
            .expect_err(&format!("{text} must fail"));
        let found = format!("{}:{} {}", error.line(), error.column(), error.config_error());
        assert_eq!(found, expected, "{text}");
    }
}

#[test]
fn yaml_reads_as_envoy_reads_it() {
    let text = r#"
admin: &admin
  address: {socket_address: {address: 127.0.0.1, port_value: 0x10}}
node:
  id: ! y
  cluster: 1.5
  metadata: {f: 1.5, i: 12, big: 12345678901, y: on, text: "12", 'null': ~}
static_resources:
  clusters:
  - name: a
    connect_timeout: 0.25s
    per_connection_buffer_limit_bytes: 1.0
    respect_dns_ttl: "yes"
"#;
    let error = yaml_to_wire(message(BOOTSTRAP), text, TextOptions::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "static_resources.clusters[a].respect_dns_ttl: expected true or false, found the string \"yes\" \
         (line 13, column 22)"
    );
    let text = text.replace("\"yes\"", "yes");
    let encoded = yaml_to_wire(message(BOOTSTRAP), &text, TextOptions::default()).unwrap();
    assert_eq!(
        to_json(message(BOOTSTRAP), &encoded),
        concat!(
            r#"{"node":{"id":"y","cluster":"1.5","metadata":{"f":"1.5","i":12,"big":"12345678901","y":true,"#,
            r#""text":"12","null":null}},"static_resources":{"clusters":[{"name":"a","connect_timeout":"0.250s","#,
            r#""per_connection_buffer_limit_bytes":1,"respect_dns_ttl":true}]},"admin":{"address":{"#,
            r#""socket_address":{"address":"127.0.0.1","port_value":16}}}}"#
        )
    );
}

#[test]
fn unknown_fields_can_be_collected() {
    let text = r#"{"x":1,"static_resources":{"clusters":[{"name":"a","y":{},"load_assignment":{"endpoints":[{"z":[]}]}}]},
        "node":{"metadata":{}}}"#;
    let options = TextOptions { allow_unknown: true };
    let encoded = json_to_wire(message(BOOTSTRAP), text, options).unwrap();
    assert_eq!(
        encoded.unknown,
        [
            "x: envoy.config.bootstrap.v3.Bootstrap has no such field (line 1, column 2)",
            "static_resources.clusters[a].y: envoy.config.cluster.v3.Cluster has no such field (line 1, column 52)",
            "static_resources.clusters[a].load_assignment.endpoints[0].z: \
             envoy.config.endpoint.v3.LocalityLbEndpoints has no such field (line 1, column 92)",
        ]
    );
    assert_eq!(
        to_json(message(BOOTSTRAP), &encoded),
        r#"{"node":{"metadata":{}},"static_resources":{"clusters":[{"name":"a","load_assignment":{"endpoints":[{}]}}]}}"#
    );
}

#[test]
fn config_dumps_look_like_envoys() {
    let text = r#"{"name":"s","tls_certificate":{"private_key":{"inline_string":"secret"},
        "certificate_chain":{"inline_string":"chain"},"password":{"inline_bytes":"c2VjcmV0"}}}"#;
    let secret = message("envoy.extensions.transport_sockets.tls.v3.Secret");
    let encoded = json_to_wire(secret, text, TextOptions::default()).unwrap();
    let mut out = String::new();
    wire_to_json(secret, &encoded.wire, &mut out, JsonStyle::CONFIG_DUMP).unwrap();
    assert_eq!(
        out,
        concat!(
            "{\n \"name\": \"s\",\n \"tls_certificate\": {\n  \"certificate_chain\": {\n   \"inline_string\": \"chain\"\n",
            "  },\n  \"private_key\": {\n   \"inline_string\": \"[redacted]\"\n  },\n  \"password\": {\n",
            "   \"inline_bytes\": \"W3JlZGFjdGVkXQ==\"\n  }\n }\n}"
        )
    );
}

#[test]
fn typed_structs_hide_their_secrets() {
    let dump = |url: &str| {
        let text = format!(
            r#"{{"typed_config":{{"@type":"type.googleapis.com/xds.type.v3.TypedStruct","type_url":"{url}","value":
            {{"name":"s","tls_certificate":{{"private_key":{{"inline_string":"secret"}},"password":
            {{"inline_string":"secret"}},"certificate_chain":{{"inline_string":"chain"}}}}}}}}}}"#
        );
        let socket = message("envoy.config.core.v3.TransportSocket");
        let encoded = json_to_wire(socket, &text, TextOptions::default()).unwrap();
        let mut out = String::new();
        wire_to_json(socket, &encoded.wire, &mut out, JsonStyle::CONFIG_DUMP).unwrap();
        assert!(out.contains(url), "{out}");
        (out.matches("secret").count(), out.matches("chain\"").count())
    };
    let known = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
    // The name of the field and the value that is no secret stay.
    assert_eq!(dump(known), (0, 2));
    // Of what is not known any text may be one.
    assert_eq!(dump("type.googleapis.com/of.nobody.Knows"), (0, 1));
}

#[test]
fn defaults_can_be_written() {
    let options = message("envoy.admin.v3.ServerInfo");
    let mut out = String::new();
    let style = JsonStyle { proto_names: true, with_defaults: true, ..JsonStyle::default() };
    wire_to_json(options, &[], &mut out, style).unwrap();
    assert_eq!(
        out,
        r#"{"version":"","state":"LIVE","hot_restart_version":"","hot_restart_initializing":false}"#
    );
}

#[test]
fn typed_structs_become_their_message() {
    let holder = message("xds.type.v3.TypedStruct");
    let text = r#"{"type_url":"type.googleapis.com/envoy.config.cluster.v3.Cluster",
        "value":{"name":"a","connectTimeout":"1s","type":"EDS","per_connection_buffer_limit_bytes":1e3}}"#;
    let encoded = json_to_wire(holder, text, TextOptions::default()).unwrap();
    // Field 2 of the TypedStruct is the struct.
    let value = {
        let mut bytes = encoded.wire.as_slice();
        let url_len = usize::from(bytes[1]);
        bytes = &bytes[2 + url_len..];
        assert_eq!(bytes[0], 0x12);
        let skip = if bytes[1] < 0x80 { 2 } else { 3 };
        &bytes[skip..]
    };
    let wire = typed_struct_to_wire(value, message(CLUSTER)).unwrap();
    let inner = Encoded { wire, unknown: Vec::new() };
    assert_eq!(
        to_json(message(CLUSTER), &inner),
        r#"{"name":"a","type":"EDS","connect_timeout":"1s","per_connection_buffer_limit_bytes":1000}"#
    );
    let error = typed_struct_to_wire(value, message("envoy.config.core.v3.Node")).unwrap_err();
    assert_eq!(error.to_string(), "name: envoy.config.core.v3.Node has no such field");
}

#[test]
fn typed_structs_in_any_are_resolved() {
    let listener = message("envoy.config.listener.v3.Listener");
    let filter = |config: &str| {
        let text = format!(
            r#"{{"filter_chains":[{{"filters":[{{"name":"x","typed_config":{config}}}]}}],"name":"l"}}"#
        );
        json_to_wire(listener, &text, TextOptions::default()).unwrap().wire
    };
    let url = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
    let plain = filter(&format!(r#"{{"@type":"{url}","stat_prefix":"s","cluster":"c"}}"#));
    assert_eq!(resolve_typed_structs(listener, &plain).unwrap(), None);
    for package in ["xds.type.v3", "udpa.type.v1"] {
        let packed = filter(&format!(
            r#"{{"@type":"type.googleapis.com/{package}.TypedStruct","type_url":"{url}",
                "value":{{"statPrefix":"s","cluster":"c"}}}}"#
        ));
        assert_eq!(resolve_typed_structs(listener, &packed).unwrap(), Some(plain.clone()));
        let unknown = filter(&format!(
            r#"{{"@type":"type.googleapis.com/{package}.TypedStruct","type_url":"a/none.Such","value":{{}}}}"#
        ));
        assert_eq!(resolve_typed_structs(listener, &unknown).unwrap(), Some(unknown));
    }
}

#[test]
fn times_may_be_objects() {
    let cluster = message(CLUSTER);
    let encode = |text: &str| json_to_wire(cluster, text, TextOptions::default()).unwrap().wire;
    let object = encode(r#"{"connect_timeout":{"seconds":1,"nanos":"500000000"}}"#);
    assert_eq!(object, encode(r#"{"connect_timeout":"1.5s"}"#));
}

#[test]
fn formats_are_told_by_the_extension() {
    let format = |name: &str| Format::of_path(std::path::Path::new(name));
    assert_eq!(format("/a/b.yaml"), Some(Format::Yaml));
    assert_eq!(format("b.pb_text"), Some(Format::ProtoText));
    assert_eq!(format("b.Yml"), Some(Format::Yaml));
    assert_eq!(format("b"), None);
    let node = message("envoy.config.core.v3.Node");
    for (format, content) in [
        (Format::Json, "{\"id\":\"a\"}"),
        (Format::Yaml, "\u{feff}id: a"),
        (Format::ProtoText, "id: 'a'"),
        (Format::ProtoBinary, "\n\u{1}a"),
    ] {
        let encoded = to_wire(node, format, content.as_bytes(), TextOptions::default()).unwrap();
        assert_eq!(encoded.wire, b"\n\x01a", "{format:?}");
    }
    let error = to_wire(node, Format::Json, b"\"\xff\"", TextOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "the text is not UTF-8 from byte 1 on");
    let error = to_wire(node, Format::Yaml, b"id: 1", TextOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "id: expected a string, found the number 1 (line 1, column 5)");
}

#[test]
fn deep_nesting_is_refused() {
    let deep = format!("{}{}", "{\"a\":".repeat(150), "}".repeat(150));
    let error = json_to_wire(
        message("google.protobuf.Struct"),
        &deep.replace("\":}", "\":1}"),
        TextOptions::default(),
    );
    assert!(error.unwrap_err().to_string().contains("nested too deeply"));
}
