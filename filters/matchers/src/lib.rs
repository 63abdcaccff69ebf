//! Compiled forms of Envoy's matchers: strings, headers, values, metadata, xDS matcher trees.
