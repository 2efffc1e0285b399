package bundles

import (
	"context"

	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Relationships answers SPIRE's trust domain service. A federation relationship
// makes a server poll another's bundle endpoint; this server polls nobody.
type Relationships struct {
	trustdomainv1.UnimplementedTrustDomainServer
}

func noRelationships() error {
	return status.Error(codes.Unimplemented, "this server polls no bundle endpoints; give it the other trust domain's bundle with `bundle set` whenever that changes, "+
		"or run the plugins on a SPIRE deployment, which polls")
}

// ListFederationRelationships lists none: that is the truth, and controllers
// ask for it at every turn.
func (Relationships) ListFederationRelationships(context.Context, *trustdomainv1.ListFederationRelationshipsRequest) (*trustdomainv1.ListFederationRelationshipsResponse, error) {
	return new(trustdomainv1.ListFederationRelationshipsResponse), nil
}

func (Relationships) GetFederationRelationship(context.Context, *trustdomainv1.GetFederationRelationshipRequest) (*types.FederationRelationship, error) {
	return nil, status.Error(codes.NotFound, "federation relationship does not exist")
}

func (Relationships) BatchCreateFederationRelationship(context.Context, *trustdomainv1.BatchCreateFederationRelationshipRequest) (*trustdomainv1.BatchCreateFederationRelationshipResponse, error) {
	return nil, noRelationships()
}

func (Relationships) BatchUpdateFederationRelationship(context.Context, *trustdomainv1.BatchUpdateFederationRelationshipRequest) (*trustdomainv1.BatchUpdateFederationRelationshipResponse, error) {
	return nil, noRelationships()
}

func (Relationships) BatchDeleteFederationRelationship(context.Context, *trustdomainv1.BatchDeleteFederationRelationshipRequest) (*trustdomainv1.BatchDeleteFederationRelationshipResponse, error) {
	return nil, noRelationships()
}

func (Relationships) RefreshBundle(context.Context, *trustdomainv1.RefreshBundleRequest) (*emptypb.Empty, error) {
	return nil, noRelationships()
}
