"""What all tests share: eight virtual CPU devices in the test process, so that meshes are real."""

from __future__ import annotations

import jax

jax.config.update("jax_num_cpu_devices", 8)
