"""How experts are spread over ranks and how tokens reach them; torch.distributed, but no engine and no model library."""
