"""Training methods: LightningModules that join networks, a loss, an optimizer and a schedule."""
