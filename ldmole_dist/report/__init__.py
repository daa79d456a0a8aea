"""The routing report: what the routers of a saved adapter do with a data set, as one HTML page and figures."""
