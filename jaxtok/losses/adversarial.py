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

from jaxtok.losses.adaptive import adaptive_weight, by_picture

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
      adaptive: "", or the path of the kernel of the decoder's last layer, "decoder/conv_out/kernel": `weight` is then
        multiplied by how much larger the gradient of all other terms is there than that of the generator's term
        (VQGAN's equation 7), and what it is multiplied by is logged as "adaptive".
      limits: of that factor.
      augment: None, or (key, pictures [B H W C]) -> pictures: what the critic sees of either kind, drawn anew in each
        step from the rng stream "train"; losses.augment has one.
      critic_loss: (logits of real pictures, of fake ones) -> scalar.
      generator_loss: (logits of fake pictures) -> scalar.
      lecam: weight of that regularizer of the critic; 0: none.
      lecam_of: "means" of the logits, with the averages before this step (TiTok's), or of "logits", with those after it
        (Open-MAGVIT2's and WeTok's). Averages have decay 0.999, begin at 0 and lie in the collection "lecam".
      r1: weight of that penalty, half of it as in its paper; 0: none.
    """

    critic: nn.Module
    weight: float = 0.1
    adaptive: str = ""
    limits: tuple[float, float] = (0.0, 1e4)
    augment: Callable | None = None
    critic_loss: Callable = hinge_critic
    generator_loss: Callable = hinge_generator
    lecam: float = 0.0
    lecam_of: str = "means"
    r1: float = 0.0

    @nn.compact
    def __call__(self, outputs, batch, norms=None):
        """The sum. norms: what TokenizerTask hands to a term that is `adaptive`.

        It takes the gradient of the generator's term by the prediction, and gives the norms at the last kernel of the
        gradient of all other terms, and of this.
        """
        if self.adaptive and norms is None and not self.is_initializing():
            raise ValueError("Adversarial.adaptive needs the norms at the last kernel, which a TokenizerTask gives it.")
        fake, real = outputs["decoded"].prediction.astype(jnp.float32), outputs["decoded"].target
        real = jax.lax.stop_gradient(real.astype(jnp.float32))
        if self.is_initializing():
            self.critic(real)
        shown, weight = self._shown(), self.weight
        module, variables = self.critic.unbind()
        held = jax.lax.stop_gradient(variables)
        if hasattr(module, "see"):  # of a frozen tower, which sees the fake pictures once, for either term
            see, judge = (functools.partial(module.apply, method=name) for name in ("see", "judge"))
        else:
            see, judge = lambda _, x: x, module.apply

        def deceive(fake):
            seen = see(held, shown(1, fake))
            return self.generator_loss(judge(held, seen)), seen

        if self.adaptive and not self.is_initializing():
            generator, seen, slope = by_picture(deceive, fake)
            factor = adaptive_weight(*norms(slope), self.limits)
            self.sow("logs", "adaptive", factor, reduce_fn=lambda _, new: new)
            weight *= factor
        else:
            generator, seen = deceive(fake)
        real = shown(0, real)
        logits_real = judge(variables, see(held, real))
        logits_fake = judge(variables, jax.lax.stop_gradient(seen))
        total = self.critic_loss(logits_real, logits_fake)
        says = dict(critic_loss=total, generator_loss=generator, real=logits_real, fake=logits_fake)
        for name, value in says.items():
            self.sow("logs", name, jax.lax.stop_gradient(value.mean()), reduce_fn=lambda _, new: new)
        if self.lecam:
            total = total + self.lecam * self._lecam(logits_real, logits_fake)
        if self.r1:
            total = total + self.r1 / 2 * r1(functools.partial(module.apply, variables), real)
        return total + weight * generator

    def _shown(self):
        """(which, pictures) -> what the critic sees of them; `which` draws: 0 for real pictures, 1 for fake ones."""
        if self.augment is None or self.is_initializing():
            return lambda which, x: x
        key = self.make_rng("train")
        return lambda which, x: self.augment(jax.random.fold_in(key, which), x)

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
