// A management server made of go-control-plane, driven by lines on stdin, for the conformance rig.
//
// It serves one listener (TLS by SDS, routes by RDS), one cluster (EDS) and one runtime layer (RTDS) by the
// transport that -mode names, and prints a line for each ACK and NACK. In the modes that end in on-demand, virtual
// hosts (VHDS) and the cluster (ODCDS) are there for those who ask for them, and each question is a line.
package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	ondemandv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/on_demand/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	clusterservice "github.com/envoyproxy/go-control-plane/envoy/service/cluster/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	endpointservice "github.com/envoyproxy/go-control-plane/envoy/service/endpoint/v3"
	listenerservice "github.com/envoyproxy/go-control-plane/envoy/service/listener/v3"
	routeservice "github.com/envoyproxy/go-control-plane/envoy/service/route/v3"
	runtimeservice "github.com/envoyproxy/go-control-plane/envoy/service/runtime/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
)

const node = "rig"

// One node is served, whatever it calls itself.
type anyNode struct{}

func (anyNode) ID(*corev3.Node) string { return node }

var output sync.Mutex

func say(format string, args ...any) {
	output.Lock()
	defer output.Unlock()
	fmt.Printf(format+"\n", args...)
}

func short(typeURL string) string { return typeURL[strings.LastIndex(typeURL, ".")+1:] }

func main() {
	mode := flag.String("mode", "ads-sotw", "ads-sotw, ads-delta, ads-on-demand, sotw, delta, on-demand or rest")
	flag.Parse()
	snapshots := cache.NewSnapshotCache(strings.HasPrefix(*mode, "ads"), anyNode{}, nil)
	callbacks := server.CallbackFuncs{
		StreamRequestFunc: func(_ int64, r *discovery.DiscoveryRequest) error {
			if r.ErrorDetail != nil {
				say("nack %s %s %q", short(r.TypeUrl), r.VersionInfo, r.ErrorDetail.Message)
			} else if r.ResponseNonce != "" {
				say("ack %s %s", short(r.TypeUrl), r.VersionInfo)
			}
			return nil
		},
		StreamDeltaRequestFunc: func(_ int64, r *discovery.DeltaDiscoveryRequest) error {
			if r.ErrorDetail != nil {
				say("nack %s - %q", short(r.TypeUrl), r.ErrorDetail.Message)
			} else if r.ResponseNonce != "" {
				say("ack %s -", short(r.TypeUrl))
			}
			for _, name := range r.ResourceNamesSubscribe {
				say("ask %s %s", short(r.TypeUrl), name)
			}
			return nil
		},
		FetchRequestFunc: func(_ context.Context, r *discovery.DiscoveryRequest) error {
			if r.ErrorDetail != nil {
				say("nack %s %s %q", short(r.TypeUrl), r.VersionInfo, r.ErrorDetail.Message)
			} else if r.VersionInfo != "" {
				say("ack %s %s", short(r.TypeUrl), r.VersionInfo)
			}
			return nil
		},
	}
	xds := server.NewServer(context.Background(), snapshots, callbacks)

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	grpcServer := grpc.NewServer()
	discovery.RegisterAggregatedDiscoveryServiceServer(grpcServer, xds)
	listenerservice.RegisterListenerDiscoveryServiceServer(grpcServer, xds)
	routeservice.RegisterRouteDiscoveryServiceServer(grpcServer, xds)
	routeservice.RegisterVirtualHostDiscoveryServiceServer(grpcServer, xds)
	clusterservice.RegisterClusterDiscoveryServiceServer(grpcServer, xds)
	endpointservice.RegisterEndpointDiscoveryServiceServer(grpcServer, xds)
	secretservice.RegisterSecretDiscoveryServiceServer(grpcServer, xds)
	runtimeservice.RegisterRuntimeDiscoveryServiceServer(grpcServer, xds)
	go func() { check(grpcServer.Serve(listener)) }()

	rest, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	gateway := &server.HTTPGateway{Server: xds}
	go func() {
		check(http.Serve(rest, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, code, err := gateway.ServeHTTP(r)
			if err != nil {
				http.Error(w, err.Error(), code)
				return
			}
			w.WriteHeader(code)
			_, _ = w.Write(body)
		})))
	}()
	say("ports %d %d", listener.Addr().(*net.TCPAddr).Port, rest.Addr().(*net.TCPAddr).Port)

	// set VERSION key=value ...
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) < 2 || words[0] != "set" {
			say("error what is %q", lines.Text())
			continue
		}
		settings := map[string]string{}
		for _, word := range words[2:] {
			key, value, _ := strings.Cut(word, "=")
			settings[key] = value
		}
		snapshot, err := build(*mode, words[1], settings)
		if err == nil {
			err = snapshots.SetSnapshot(context.Background(), node, snapshot)
		}
		if err != nil {
			say("error %v", err)
			continue
		}
		say("set %s", words[1])
	}
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func onDemand(mode string) bool { return strings.HasSuffix(mode, "on-demand") }

func source(mode string) *corev3.ConfigSource {
	out := &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3}
	if strings.HasPrefix(mode, "ads") {
		out.ConfigSourceSpecifier = &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}
		return out
	}
	api := &corev3.ApiConfigSource{TransportApiVersion: corev3.ApiVersion_V3}
	switch mode {
	case "rest":
		api.ApiType = corev3.ApiConfigSource_REST
		api.ClusterNames = []string{"rest"}
		api.RefreshDelay = durationpb.New(200 * time.Millisecond)
		api.RequestTimeout = durationpb.New(time.Second)
	default:
		api.ApiType = corev3.ApiConfigSource_GRPC
		if mode == "delta" || onDemand(mode) {
			api.ApiType = corev3.ApiConfigSource_DELTA_GRPC
		}
		api.GrpcServices = []*corev3.GrpcService{{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
			EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: "xds"}}}}
	}
	out.ConfigSourceSpecifier = &corev3.ConfigSource_ApiConfigSource{ApiConfigSource: api}
	return out
}

func build(mode, version string, settings map[string]string) (*cache.Snapshot, error) {
	upstream, err := strconv.Atoi(settings["upstream"])
	if err != nil {
		return nil, err
	}
	// Makes another cluster of it.
	timeout, _ := strconv.Atoi(settings["timeout"])
	flagPercent, err := strconv.ParseFloat(settings["flag"], 64)
	if err != nil {
		return nil, err
	}
	listener, err := ingress(mode)
	if err != nil {
		return nil, err
	}
	clusters := []types.Resource{&clusterv3.Cluster{
		Name:                 "service",
		ConnectTimeout:       durationpb.New(time.Second + time.Duration(timeout)*time.Millisecond),
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: source(mode)},
	}}
	if settings["bad"] != "" {
		clusters = append(clusters, &clusterv3.Cluster{Name: "bad", ConnectTimeout: durationpb.New(-time.Second)})
	}
	layer, err := structpb.NewStruct(map[string]any{"rig.flag": flagPercent})
	if err != nil {
		return nil, err
	}
	table := routes(settings["header"])
	var hosts []types.Resource
	if onDemand(mode) {
		// The server says nothing of what it does not have, and so not that it has no other virtual hosts.
		vhds := source(mode)
		vhds.InitialFetchTimeout = durationpb.New(200 * time.Millisecond)
		all := table.VirtualHosts[0]
		table = &routev3.RouteConfiguration{Name: "routes", Vhds: &routev3.Vhds{ConfigSource: vhds}}
		for _, name := range strings.Split(settings["hosts"], ",") {
			hosts = append(hosts, &routev3.VirtualHost{
				Name: "routes/" + name, Domains: []string{name}, Routes: all.Routes})
		}
	}
	return cache.NewSnapshot(version, map[resource.Type][]types.Resource{
		resource.ListenerType:    {listener},
		resource.RouteType:       {table},
		resource.VirtualHostType: hosts,
		resource.ClusterType:     clusters,
		resource.EndpointType:    {endpoints(uint32(upstream))},
		resource.SecretType:      {secret(settings["cert"])},
		resource.RuntimeType:     {&runtimeservice.Runtime{Name: "rtds", Layer: layer}},
	})
}

func packed(message proto.Message) *anypb.Any {
	out, err := anypb.New(message)
	check(err)
	return out
}

func address(port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: "127.0.0.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}
}

func ingress(mode string) (*listenerv3.Listener, error) {
	filters := []*hcmv3.HttpFilter{{Name: "router",
		ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed(&routerv3.Router{})}}}
	if onDemand(mode) {
		fetch := &ondemandv3.OnDemand{Odcds: &ondemandv3.OnDemandCds{Source: source(mode)}}
		filters = append([]*hcmv3.HttpFilter{{Name: "on_demand",
			ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed(fetch)}}}, filters...)
	}
	hcm, err := anypb.New(&hcmv3.HttpConnectionManager{
		StatPrefix: "ingress",
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
			RouteConfigName: "routes", ConfigSource: source(mode)}},
		HttpFilters: filters,
	})
	if err != nil {
		return nil, err
	}
	tls, err := anypb.New(&tlsv3.DownstreamTlsContext{CommonTlsContext: &tlsv3.CommonTlsContext{
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{{Name: "cert", SdsConfig: source(mode)}}}})
	if err != nil {
		return nil, err
	}
	return &listenerv3.Listener{
		Name:    "ingress",
		Address: address(0),
		FilterChains: []*listenerv3.FilterChain{{
			Filters: []*listenerv3.Filter{{Name: "http",
				ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: hcm}}},
			TransportSocket: &corev3.TransportSocket{Name: "tls",
				ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: tls}},
		}},
	}, nil
}

func routes(header string) *routev3.RouteConfiguration {
	return &routev3.RouteConfiguration{Name: "routes", VirtualHosts: []*routev3.VirtualHost{{
		Name: "all", Domains: []string{"*"}, Routes: []*routev3.Route{
			{
				Match: &routev3.RouteMatch{
					PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/flag"},
					RuntimeFraction: &corev3.RuntimeFractionalPercent{
						RuntimeKey:   "rig.flag",
						DefaultValue: &typev3.FractionalPercent{Numerator: 0},
					},
				},
				Action: &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{Status: 200,
					Body: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: "flag"}}}},
			},
			{
				Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{
					ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: "service"}}},
				ResponseHeadersToAdd: []*corev3.HeaderValueOption{{
					Header: &corev3.HeaderValue{Key: "x-route", Value: header}}},
			},
		}}}}
}

func endpoints(port uint32) *endpointv3.ClusterLoadAssignment {
	return &endpointv3.ClusterLoadAssignment{ClusterName: "service", Endpoints: []*endpointv3.LocalityLbEndpoints{{
		LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{
			Endpoint: &endpointv3.Endpoint{Address: address(port)}}}}}}}
}

// A certificate is named by its path without the ending.
func secret(path string) *tlsv3.Secret {
	read := func(ending string) *corev3.DataSource {
		bytes, err := os.ReadFile(path + ending)
		check(err)
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: bytes}}
	}
	return &tlsv3.Secret{Name: "cert", Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: read(".pem"), PrivateKey: read(".key")}}}
}
