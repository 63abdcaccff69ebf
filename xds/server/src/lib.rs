//! The embedded management server: a folder of resources served over xDS.
