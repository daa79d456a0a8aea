"""The scaling study: measure configurations, fit a model of the step time, and write a page: `ldmole scaling`."""
