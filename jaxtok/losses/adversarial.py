"""A critic learns to tell pictures from reconstructions, and the tokenizer to deceive it (arXiv 1406.2661; 2012.09841).

Both terms are part of a run's one scalar. The critic's sees pictures through which no gradient passes, the generator's
a critic whose parameters are held constant; so one backward pass gives either network exactly the gradient of its own
term. What the two have in common, the logits of the reconstructions, the compiler computes once.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

# ---- of logits of real pictures and of fake ones, [B h w 1] ----


def hinge_critic(real, fake):
    """Half of mean relu(1 - real) + mean relu(1 + fake) (arXiv 1705.02894)."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def hinge_generator(fake):
    """Minus the mean logit."""
    return -fake.mean()


def softplus_critic(real, fake):
    """Half of both cross-entropies: mean softplus(-real) + mean softplus(fake)."""
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())


def softplus_generator(fake):
    """The cross-entropy of being taken for real, by the mean logit of each picture: Open-MAGVIT2's and WeTok's form."""
    return jax.nn.softplus(-fake.mean(tuple(range(1, fake.ndim)))).mean()


def lecam(real, fake, average_real, average_fake):
    """LeCAM (arXiv 2104.03310): relu(real - average fake)^2 + relu(average real - fake)^2, each a mean over logits.

    It holds the critic's logits near to the moving averages of the other side. Given means instead of logits, it is
    TiTok's form; the mean of a relu is not the relu of a mean.
    """
    return jnp.square(jax.nn.relu(real - average_fake)).mean() + jnp.square(jax.nn.relu(average_real - fake)).mean()


def r1(critic, real):
    """The squared gradient of a picture's summed logits by its pixels, a mean over pictures (arXiv 1801.04406).

    critic: pictures [B H W C] -> logits. Real pictures only.
    """
    slope = jax.grad(lambda x: critic(x).sum())(real)
    return jnp.square(slope).sum(tuple(range(1, slope.ndim))).mean()


class Adversarial(nn.Module):
    """The critic's term plus `weight` times the generator's, float32. Reads `outputs["decoded"]`, pictures.

    Both begin at the term's `start`, as published recipes have it; before, neither network hears of the other. The term
    itself should have weight 1, for what is before the generator's term belongs here. The log has "critic_loss"
    and "generator_loss", and the mean logits of either kind, "real" and "fake".

    Attributes:
      critic: pictures [B H W C] -> logits, as losses.critics has them.
      weight: of the generator's term.
      critic_loss: (logits of real pictures, of fake ones) -> scalar.
      generator_loss: (logits of fake pictures) -> scalar.
      lecam: weight of that regularizer of the critic; 0: none.
      lecam_of: "means" of the logits, with the averages before this step (TiTok's), or of "logits", with those after it
        (Open-MAGVIT2's and WeTok's). Averages have decay 0.999, begin at 0 and lie in the collection "lecam".
      r1: weight of that penalty, half of it as in its paper; 0: none.
    """

    critic: nn.Module
    weight: float = 0.1
    critic_loss: Callable = hinge_critic
    generator_loss: Callable = hinge_generator
    lecam: float = 0.0
    lecam_of: str = "means"
    r1: float = 0.0

    @nn.compact
    def __call__(self, outputs, batch):
        fake, real = outputs["decoded"].prediction.astype(jnp.float32), outputs["decoded"].target
        real, unmoved = jax.lax.stop_gradient((real.astype(jnp.float32), fake))
        if self.is_initializing():
            self.critic(real)
        module, variables = self.critic.unbind()
        critic = functools.partial(module.apply, variables)
        logits_real, logits_fake = critic(real), critic(unmoved)
        generator = self.generator_loss(module.apply(jax.lax.stop_gradient(variables), fake))
        total = self.critic_loss(logits_real, logits_fake)
        says = dict(critic_loss=total, generator_loss=generator, real=logits_real, fake=logits_fake)
        for name, value in says.items():
            self.sow("logs", name, jax.lax.stop_gradient(value.mean()), reduce_fn=lambda _, new: new)
        if self.lecam:
            total = total + self.lecam * self._lecam(logits_real, logits_fake)
        if self.r1:
            total = total + self.r1 / 2 * r1(critic, real)
        return total + self.weight * generator

    def _lecam(self, real, fake):
        if self.lecam_of not in ("means", "logits"):
            raise ValueError(f'Adversarial.lecam_of is "means" or "logits", not "{self.lecam_of}".')
        kept = [self.variable("lecam", name, jnp.zeros, ()) for name in ("real", "fake")]
        before = [average.value for average in kept]
        means = real.mean(), fake.mean()
        after = [
            0.999 * average + 0.001 * jax.lax.stop_gradient(mean) for average, mean in zip(before, means, strict=True)
        ]
        if self.is_mutable_collection("lecam") and not self.is_initializing():
            for average, new in zip(kept, after, strict=True):
                average.value = new
        return lecam(*means, *before) if self.lecam_of == "means" else lecam(real, fake, *after)
