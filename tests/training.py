"""Train torch networks, for tests of the states that their optimizers save."""


def training_steps(model, optimizer, x, target, steps):
    """Train on the mean squared error, and yield before each update.

    Yields
    ------
    tuple
        Number of the step, the gradient of each parameter by its name, and the loss.
    """
    for step in range(steps):
        optimizer.zero_grad()
        loss = ((model(x) - target) ** 2).mean()
        loss.backward()
        yield step, {name: p.grad.clone() for name, p in model.named_parameters()}, loss
        optimizer.step()
