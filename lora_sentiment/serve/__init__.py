"""One base and many adapters behind an HTTP interface and a page."""
