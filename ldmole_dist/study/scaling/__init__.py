"""How training scales on this machine: a cell of settings at a time, a model fitted to them, and one page that says it."""
