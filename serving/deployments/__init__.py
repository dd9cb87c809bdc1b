"""Ray Serve as the server's shell: placement, routing, health. The only importer of ray."""
