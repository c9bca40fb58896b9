"""What clients are told of the API itself: errors by dialect, fields by route, OpenAPI, /docs. All of it is read off
the declarations that also do the work: error classes, dialects, routes, bodies."""
