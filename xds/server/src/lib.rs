//! The embedded management server: a folder of resources served over xDS.

#![forbid(unsafe_code)]

pub mod cli;
