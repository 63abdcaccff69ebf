//! Clusters, hosts, load balancing and discovery of endpoints.
