"""Latents to outputs; one file per kind of query."""

from models.perceiver.queries.base import QueryDecoder
from models.perceiver.queries.embeddings import EmbeddingQueries
from models.perceiver.queries.patches import PatchQueries
from models.perceiver.queries.text import TextDecoder

__all__ = ["EmbeddingQueries", "PatchQueries", "QueryDecoder", "TextDecoder"]
