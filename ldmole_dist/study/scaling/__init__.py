"""The scaling study: measured configurations, a model fitted to them, and a page with both: `ldmole scaling`."""
