//! Listener filters: tls_inspector, http_inspector, proxy_protocol, original_dst.
