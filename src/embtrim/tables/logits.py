"""Inner products with all embeddings of a table."""

from __future__ import annotations

from torch import Tensor, nn

from embtrim.tables.replacements import Replacement


def table_logits(input: Tensor, table: nn.Module) -> Tensor:
    """Inner products of vectors with all embeddings of a table: `input @ table.weight.T`, at the cost of what is stored.

    Args:
        input: Vectors (..., D).
        table: An nn.Embedding or nn.EmbeddingBag of V rows, or the compact table in its place. The products of a compact
            table are those with its stored columns and rows, spread over all ids; its weight (V, D) is not built.

    Returns:
        (..., V) logits.

    Example:
        >>> table_logits(torch.ones(2, 4), nn.Embedding(9, 4)).shape
        torch.Size([2, 9])
    """
    return table.logits(input) if isinstance(table, Replacement) else nn.functional.linear(input, table.weight)  # type: ignore[arg-type]
