"""Programs that use Jobledger as a service would; each runs in CI."""
