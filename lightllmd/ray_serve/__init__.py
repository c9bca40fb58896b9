"""Ray Serve: an application (`application.build`) each of whose replicas is a lightllmd daemon with its engine."""
