"""Loss terms as pure functions of logits, and the frozen callables that `conf/loss` composes from them."""
