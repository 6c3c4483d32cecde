"""Training methods, each a LightningModule that joins networks, a loss, an optimizer and a schedule."""
