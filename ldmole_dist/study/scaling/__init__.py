"""The scaling study: measure optimizer steps of many configurations and write a page: `ldmole scaling`."""
