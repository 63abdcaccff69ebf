//! The differential rig: one case file against real Envoy and against waystation.
