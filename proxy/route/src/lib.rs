//! Route tables: virtual hosts, matchers and actions, compiled once and matched flat.
