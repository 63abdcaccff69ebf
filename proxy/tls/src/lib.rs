//! TLS contexts and secrets over rustls.
