"""The CheckpointServer: stores checkpoints durably on its host, and exchanges them with its peers over gRPC."""
