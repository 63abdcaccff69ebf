//! `envoy.filters.http.header_mutation`.

use std::sync::Arc;
use std::time::Instant;

use envoy_types::pb::envoy::extensions::filters::http::header_mutation::v3 as pb;
use waystation_filter_api::http::{
    FactoryContext, FilterConfig, Flow, HttpFilter, HttpFilterExtension, HttpFilterFactory, Phases, StreamCx,
};
use waystation_filter_api::stream::StreamInfo;
use waystation_filter_api::wire::decode;
use waystation_format::{AccessLogType, FormatContext, HeaderMutationList, QueryMutationList};
use waystation_http::Headers;
use waystation_schema::{At, ConfigError};

/// The filter.
pub static EXTENSION: HttpFilterExtension = HttpFilterExtension {
    name: "envoy.filters.http.header_mutation",
    type_name: "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
    route_type_name: Some("envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute"),
    compile,
    compile_route,
};

#[derive(Debug)]
struct Mutations {
    request: HeaderMutationList,
    query: QueryMutationList,
    response: HeaderMutationList,
    response_trailers: HeaderMutationList,
    request_trailers: HeaderMutationList,
}

#[derive(Debug)]
struct Factory {
    own: Option<Arc<Mutations>>,
    most_specific_wins: bool,
}

/// The levels' mutations in the order in which they apply.
struct Filter {
    levels: Vec<Arc<Mutations>>,
}

fn compile(wire: &[u8], _cx: &FactoryContext<'_>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
    let pb::HeaderMutation { mutations, most_specific_header_mutations_wins } = decode(wire)?;
    let own = mutations.as_ref().map(|proto| Mutations::compile(proto).at(|| "mutations")).transpose()?;
    Ok(Arc::new(Factory { own: own.map(Arc::new), most_specific_wins: most_specific_header_mutations_wins }))
}

fn compile_route(wire: &[u8], _cx: &FactoryContext<'_>) -> Result<FilterConfig, ConfigError> {
    let pb::HeaderMutationPerRoute { mutations } = decode(wire)?;
    Ok(Arc::new(Mutations::compile(&mutations.unwrap_or_default()).at(|| "mutations")?))
}

impl Mutations {
    fn compile(proto: &pb::Mutations) -> Result<Self, ConfigError> {
        let pb::Mutations {
            request_mutations,
            query_parameter_mutations,
            response_mutations,
            response_trailers_mutations,
            request_trailers_mutations,
        } = proto;
        Ok(Self {
            request: HeaderMutationList::compile(request_mutations).at(|| "request_mutations")?,
            query: QueryMutationList::compile(query_parameter_mutations)
                .at(|| "query_parameter_mutations")?,
            response: HeaderMutationList::compile(response_mutations).at(|| "response_mutations")?,
            response_trailers: HeaderMutationList::compile(response_trailers_mutations)
                .at(|| "response_trailers_mutations")?,
            request_trailers: HeaderMutationList::compile(request_trailers_mutations)
                .at(|| "request_trailers_mutations")?,
        })
    }
}

impl HttpFilterFactory for Factory {
    fn phases(&self) -> Phases {
        Phases {
            request_headers: true,
            request_trailers: true,
            response_headers: true,
            response_trailers: true,
            ..Phases::default()
        }
    }

    fn create(&self, route_config: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        let routes = route_config.iter().filter_map(|config| Arc::clone(config).downcast::<Mutations>().ok());
        let mut levels: Vec<Arc<Mutations>> = routes.collect();
        // Levels come most specific first; the one that applies last has the last word.
        if self.most_specific_wins {
            levels.reverse();
        }
        if let Some(own) = &self.own {
            levels.insert(0, Arc::clone(own));
        }
        (!levels.is_empty()).then(|| Box::new(Filter { levels }) as _)
    }
}

impl HttpFilter for Filter {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, _end: bool) -> Flow {
        for level in &self.levels {
            level.request.apply_to_request(head, &context(cx.info, None));
            level.query.apply(head, &context(cx.info, None));
        }
        Flow::Continue
    }

    fn decode_trailers(&mut self, cx: &mut StreamCx<'_>, trailers: &mut Headers) -> Flow {
        for level in &self.levels {
            level.request_trailers.apply(trailers, &context(cx.info, cx.request.as_deref()));
        }
        Flow::Continue
    }

    fn encode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, _end: bool) -> Flow {
        for level in &self.levels {
            level.response.apply_to_response(head, &context(cx.info, cx.request.as_deref()));
        }
        Flow::Continue
    }

    fn encode_trailers(&mut self, cx: &mut StreamCx<'_>, trailers: &mut Headers) -> Flow {
        for level in &self.levels {
            level.response_trailers.apply(trailers, &context(cx.info, cx.request.as_deref()));
        }
        Flow::Continue
    }
}

fn context<'a>(info: &'a StreamInfo, request: Option<&'a Headers>) -> FormatContext<'a> {
    FormatContext {
        request,
        response: None,
        trailers: None,
        info,
        local_reply_body: "",
        log_type: AccessLogType::NotSet,
        now: Instant::now(),
    }
}
