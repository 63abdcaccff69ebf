//! What warming costs, and what it waits for.

use envoy_types::pb::envoy::config::route::v3 as route;
use prost::Message as _;
use waystation_route::RouteTable;
use waystation_schema::{Message, TextOptions, yaml_to_wire};
use waystation_xds::{Options, Resource, ResourceType, SubId, Update, UpdateToken};

use super::*;
use crate::context::tests::shared;
use crate::manager::routes;

/// A main thread without a management server: the test says what has come.
struct Main {
    shared: Arc<Shared>,
    client: Client,
    needs: Needs,
    listeners: Listeners,
    now: Instant,
}

const SOURCE: &str = "{resource_api_version: V3, api_config_source: {api_type: GRPC, transport_api_version: V3, \
                      grpc_services: [{envoy_grpc: {cluster_name: x}}]}}";

impl Main {
    fn new() -> Self {
        let shared = shared();
        let options = Options { node: Bytes::new(), ads: None, seed: 1, unix_ms: 0 };
        Self {
            client: Client::new(options, crate::xds_transport::transport(&shared)),
            needs: Needs::default(),
            listeners: Listeners::new(&shared, 1, Mode::Validate),
            now: Instant::now(),
            shared,
        }
    }

    /// A listener on this port with a filter chain for each of `routes`.
    fn listener(port: usize, routes: &[String]) -> pb::Listener {
        let chain = |(index, routes): (usize, &String)| {
            format!(
                "{{name: c{index}, filter_chain_match: {{destination_port: {}}}, filters: [{{name: h, typed_config: \
                 {{'@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, \
                 stat_prefix: s, {routes}, http_filters: [{{name: r, typed_config: \
                 {{'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]}}}}]}}",
                index + 1
            )
        };
        let chains: Vec<_> = routes.iter().enumerate().map(chain).collect();
        let yaml = format!(
            "{{name: l{port}, address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}, filter_chains: [{}]}}",
            chains.join(", ")
        );
        let message = Message::find("envoy.config.listener.v3.Listener").unwrap();
        let wire = yaml_to_wire(message, &yaml, TextOptions::default()).unwrap().wire;
        pb::Listener::decode(&*wire).unwrap()
    }

    fn add(&mut self, proto: &pb::Listener) {
        let version = Arc::from("1");
        let wire = proto.encode_to_vec().into();
        let offered = Offered { proto, wire, version: &version, dynamic: true };
        self.listeners.add(offered, &mut self.needs, &mut self.client).unwrap();
    }

    fn subs(&mut self) -> Vec<SubId> {
        self.needs.take_fresh().into_iter().map(|(sub, _)| sub).collect()
    }

    /// How many listeners serve after what has happened.
    fn active(&mut self) -> usize {
        let settled = self.needs.take_settled();
        self.listeners.needs_settled(&settled);
        self.listeners.activate(self.now, &self.needs);
        self.listeners.active().count()
    }
}

fn rds(name: &str) -> String {
    format!("rds: {{route_config_name: {name}, config_source: {SOURCE}}}")
}

fn srds() -> String {
    format!(
        "scoped_routes: {{name: s, rds_config_source: {SOURCE}, scope_key_builder: {{fragments: [{{header_value_extractor: \
         {{name: x, element_separator: ';', index: 0}}}}]}}, scoped_rds: {{scoped_rds_config_source: {SOURCE}}}}}"
    )
}

#[tokio::test]
async fn warming_is_linear() {
    const COUNT: usize = 500;
    let mut main = Main::new();
    for port in 1..=COUNT {
        main.add(&Main::listener(port, &[rds(&format!("r{port}"))]));
    }
    assert_eq!((main.active(), main.listeners.all_settled(&main.needs)), (0, false));
    for sub in main.subs() {
        main.needs.settle(sub);
        main.active();
    }
    assert_eq!((main.active(), main.listeners.all_settled(&main.needs)), (COUNT, true));
    assert_eq!(main.listeners.looks, 2 * COUNT as u64);
}

#[tokio::test]
async fn a_listener_is_looked_at_when_the_last_of_its_needs_has_come() {
    let mut main = Main::new();
    let routes: Vec<_> = (0..500).map(|index| rds(&format!("r{index}"))).collect();
    main.add(&Main::listener(1, &routes));
    main.active();
    let subs = main.subs();
    let (last, others) = subs.split_last().unwrap();
    for sub in others {
        main.needs.settle(*sub);
        assert_eq!(main.active(), 0);
    }
    assert_eq!(main.listeners.looks, 1);
    // Its update needs one more.
    main.add(&Main::listener(1, &[routes, vec![rds("new")]].concat()));
    main.needs.settle(*last);
    assert_eq!(main.active(), 0);
    let new = main.subs()[0];
    main.needs.settle(new);
    assert_eq!((main.active(), main.listeners.looks), (1, 3));
}

#[tokio::test]
async fn filter_chains_may_share_their_routes() {
    let mut main = Main::new();
    main.add(&Main::listener(1, &[rds("a"), rds("a"), rds("b")]));
    assert_eq!(main.active(), 0);
    for (sub, active) in main.subs().into_iter().zip([0, 1]) {
        main.needs.settle(sub);
        assert_eq!((main.active(), main.listeners.all_settled(&main.needs)), (active, active == 1));
    }
}

#[tokio::test]
async fn scopes_are_there_with_the_last_of_their_route_configurations() {
    const COUNT: usize = 1_000;
    let mut main = Main::new();
    main.add(&Main::listener(1, &[srds()]));
    let [sub] = main.subs()[..] else { panic!("one set of scopes") };
    assert_eq!(main.active(), 0);
    main.offer_scopes(sub, 0..COUNT);
    main.needs.settle(sub);
    assert_eq!(main.active(), 0);
    let routes = main.subs();
    assert_eq!(routes.len(), COUNT);
    let active_scopes = |main: &Main| main.shared.stats.find("http.s.scoped_rds.s.active_scopes");
    for (count, sub) in (1..).zip(&routes) {
        let proto = route::RouteConfiguration::default();
        let table: RouteTable = routes::compile(&proto, false, &main.shared).unwrap();
        main.needs.apply_routes(*sub, table, None, &main.shared, &mut main.client).unwrap();
        main.needs.settle(*sub);
        assert_eq!(main.active(), usize::from(count == COUNT));
        assert_eq!(active_scopes(&main), Some(count as u64));
    }
    // The update, and the last route configuration.
    assert_eq!((main.listeners.looks, main.needs.looks), (2, 2));

    // A scope that comes later is not waited for by those who serve, but by those who warm.
    main.offer_scopes(sub, COUNT..COUNT + 1);
    main.needs.settle(sub);
    assert_eq!(active_scopes(&main), Some(COUNT as u64));
    main.add(&Main::listener(2, &[srds()]));
    assert_eq!(main.active(), 1);
    let late = main.subs()[0];
    main.needs.settle(late);
    assert_eq!(main.active(), 2);
}

impl Main {
    fn offer_scopes(&mut self, sub: SubId, numbers: std::ops::Range<usize>) {
        use route::scoped_route_configuration::{Key, key};
        let scopes = numbers.map(|number| {
            let text = key::fragment::Type::StringKey(number.to_string());
            route::ScopedRouteConfiguration {
                name: format!("s{number}"),
                route_configuration_name: format!("r{number}"),
                key: Some(Key { fragments: vec![key::Fragment { r#type: Some(text) }] }),
                ..Default::default()
            }
        });
        let scopes: Vec<_> = scopes.collect();
        let resource = |scope: &route::ScopedRouteConfiguration| Resource {
            name: scope.name.as_str().into(),
            version: "1".into(),
            aliases: Vec::new(),
            body: scope.encode_to_vec().into(),
        };
        let update = Update {
            sub,
            kind: ResourceType::ScopedRouteConfiguration,
            token: UpdateToken::default(),
            version: "1".into(),
            resources: scopes.iter().map(resource).collect(),
            removed: Vec::new(),
        };
        let offered = update.resources.iter().zip(scopes).collect();
        let rejected = self.needs.apply_scopes(&update, offered, &self.shared, &mut self.client);
        assert!(rejected.is_empty(), "{rejected:?}");
    }
}
