//! Command operators, header mutation and access logs.
