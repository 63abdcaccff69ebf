//! `envoy.filters.http.buffer`: holds a request until all of it is there.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::http::buffer::v3 as pb;
use waystation_filter_api::http::{
    BodyData, FactoryContext, FilterConfig, Flow, Hold, HttpFilter, HttpFilterExtension, HttpFilterFactory,
    Phases, StreamCx, most_specific,
};
use waystation_filter_api::wire::{decode, u32_value};
use waystation_http::{Headers, Known};
use waystation_schema::ConfigError;

/// The filter.
pub static EXTENSION: HttpFilterExtension = HttpFilterExtension {
    name: "envoy.filters.http.buffer",
    type_name: "envoy.extensions.filters.http.buffer.v3.Buffer",
    route_type_name: Some("envoy.extensions.filters.http.buffer.v3.BufferPerRoute"),
    compile,
    compile_route,
};

/// `Buffer` or `BufferPerRoute`: the most bytes, or nothing at all.
#[derive(Clone, Copy, Debug)]
enum Settings {
    Disabled,
    Max(usize),
}

#[derive(Debug)]
struct Factory(Settings);

fn compile(wire: &[u8], _: &FactoryContext<'_>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
    Ok(Arc::new(Factory(max(&decode(wire)?)?)))
}

fn compile_route(wire: &[u8], _: &FactoryContext<'_>) -> Result<FilterConfig, ConfigError> {
    use pb::buffer_per_route::Override;
    Ok(Arc::new(match decode::<pb::BufferPerRoute>(wire)?.r#override {
        Some(Override::Disabled(true)) => Settings::Disabled,
        Some(Override::Buffer(buffer)) => max(&buffer)?,
        Some(Override::Disabled(false)) | None => {
            return Err(ConfigError::new("disabled or buffer is required"));
        }
    }))
}

fn max(proto: &pb::Buffer) -> Result<Settings, ConfigError> {
    let max = u32_value(proto.max_request_bytes.as_ref());
    let max = max.ok_or_else(|| ConfigError::field("max_request_bytes", "value is required"))?;
    // No more than an address space.
    Ok(Settings::Max(max as usize))
}

impl HttpFilterFactory for Factory {
    fn phases(&self) -> Phases {
        Phases { request_headers: true, ..Phases::default() }
    }

    fn create(&self, route_config: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        let settings = most_specific(route_config).unwrap_or(&self.0);
        matches!(settings, Settings::Max(_)).then(|| Box::new(Watch) as _)
    }
}

/// Looks at the head. Takes no memory: most requests have no body.
struct Watch;

impl HttpFilter for Watch {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, _head: &mut Headers, end: bool) -> Flow {
        let settings = cx.most_specific().unwrap_or(&cx.config::<Factory>().0);
        let Settings::Max(max) = settings else { return Flow::Continue };
        if end {
            return Flow::Continue;
        }
        cx.set_request_buffer_limit(*max);
        let phases =
            Phases { request_headers: true, request_body: true, request_trailers: true, ..Phases::default() };
        cx.succeed_by(Box::new(Buffering { bytes: 0 }), phases);
        Flow::Pause(Hold::Buffer)
    }
}

/// Holds head and body.
struct Buffering {
    bytes: usize,
}

impl HttpFilter for Buffering {
    fn decode_data(&mut self, cx: &mut StreamCx<'_>, data: &mut BodyData, end: bool) -> Flow {
        // All of it, each time.
        self.bytes = data.as_slice().len();
        if !end {
            return Flow::Pause(Hold::Buffer);
        }
        self.state_length(cx);
        Flow::Continue
    }

    fn decode_trailers(&mut self, cx: &mut StreamCx<'_>, _trailers: &mut Headers) -> Flow {
        self.state_length(cx);
        Flow::Continue
    }
}

impl Buffering {
    /// Now that it is known.
    fn state_length(&self, cx: &mut StreamCx<'_>) {
        if let Some(head) = &mut cx.request
            && !head.contains(Known::ContentLength)
        {
            head.remove(Known::TransferEncoding);
            head.set_number(Known::ContentLength, self.bytes as u64);
        }
    }
}
