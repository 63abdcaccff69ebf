//! The proxy: process, listeners, connections, HTTP, admin.
