//! Why a message was refused, and what to answer.

/// A violation of the protocol or of a limit. After one the connection is only good for the answer.
///
/// Each carries the answer that Envoy gives a client (the caller writes it) and the response code details it logs;
/// the response flag is always `DPE` downstream and `UPE`, with a 502, upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{}", self.details())]
#[non_exhaustive]
pub enum Error {
    /// Not HTTP/1, or not to be delimited without doubt.
    Codec,
    /// A control character where there may be none.
    InvalidCharacters,
    /// The head, or the trailers, are larger than the limit.
    HeadersTooLarge,
    /// More header lines than the limit.
    TooManyHeaders,
    /// Both `content-length` and `transfer-encoding`.
    ContentLengthAndChunked,
    /// `content-length` in a response that has no body by definition.
    ContentLengthNotAllowed,
    /// `transfer-encoding` in a response that has no body by definition.
    TransferEncodingNotAllowed,
    /// A transfer coding other than `chunked`.
    InvalidTransferEncoding,
    /// A CONNECT request that declares a body.
    BodyDisallowed,
    /// `connection` nominates a header that must not be removed, or too many.
    ConnectionHeaderRejected,
    /// A request target that is not a URL.
    InvalidUrl,
    /// A request target with a scheme other than `http` and `https`.
    InvalidScheme,
    /// A header name with an underscore, where these are rejected.
    UnexpectedUnderscore,
    /// A host with characters that no host has.
    InvalidAuthority,
    /// HTTP/1.0 or older, where it is not accepted.
    LowVersion,
    /// The peer closed the connection in the middle of a message.
    Incomplete,
}

impl Error {
    /// The status to answer a request with.
    pub fn status(self) -> u16 {
        match self {
            Error::HeadersTooLarge | Error::TooManyHeaders => 431,
            Error::InvalidTransferEncoding => 501,
            Error::LowVersion => 426,
            _ => 400,
        }
    }

    /// The body of that answer: the status's reason phrase, as `text/plain`.
    pub fn body(self) -> &'static str {
        crate::reason::reason_phrase(self.status())
    }

    /// What `%RESPONSE_CODE_DETAILS%` says.
    pub fn details(self) -> &'static str {
        match self {
            Error::Codec | Error::Incomplete => "http1.codec_error",
            Error::InvalidCharacters => "http1.invalid_characters",
            Error::HeadersTooLarge => "http1.headers_too_large",
            Error::TooManyHeaders => "http1.too_many_headers",
            Error::ContentLengthAndChunked => "http1.content_length_and_chunked_not_allowed",
            Error::ContentLengthNotAllowed => "http1.content_length_not_allowed",
            Error::TransferEncodingNotAllowed => "http1.transfer_encoding_not_allowed",
            Error::InvalidTransferEncoding => "http1.invalid_transfer_encoding",
            Error::BodyDisallowed => "http1.body_disallowed",
            Error::ConnectionHeaderRejected => "http1.connection_header_rejected",
            Error::InvalidUrl => "http1.invalid_url",
            Error::InvalidScheme => "http1.invalid_scheme",
            Error::UnexpectedUnderscore => "http1.unexpected_underscore",
            Error::InvalidAuthority => "http.invalid_authority",
            Error::LowVersion => "low_version",
        }
    }
}
