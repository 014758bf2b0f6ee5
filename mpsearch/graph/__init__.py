"""The structure of a network: layers, links between them, sharing, folding, channel scaling, calls, activation memory."""
