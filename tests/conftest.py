"""Eight simulated devices for every test, and a generator that compiles quickly."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Threefry's rounds, unrolled into every initialiser, take most of a small model's compile time.
jax.config.update("jax_default_prng_impl", "rbg")
