"""PerceiverIO's runs: their configuration, loaders and presets."""
