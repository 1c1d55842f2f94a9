# A container that runs `pwm`. For a machine without a GPU:
#
#   docker build -t pwm_torchrl:0.1.0 --build-arg COMMIT="$(git rev-parse HEAD)" .
#   docker run --rm -it --user "$(id -u):$(id -g)" -v "$PWD:/work" pwm_torchrl:0.1.0 train env=pendulum
#
# For NVIDIA GPUs: --build-arg TORCH_INDEX=https://pypi.org/simple, whose builds for Linux bring CUDA (some gigabytes), or
# https://download.pytorch.org/whl/TAG for another CUDA; then docker run --gpus all.

# Two stages, so that pip, its cache and the sources stay out of the image. Both begin with the Python that
# constraints.txt holds versions for.
FROM python:3.11-slim-bookworm AS build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# torch alone first: it is the largest layer and changes least.
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch==$TORCH"

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY hydra_plugins hydra_plugins
COPY pwm_torchrl pwm_torchrl
ARG EXTRAS=gym,mujoco,dm-control,launch,tensorboard,wandb,hub,plot,video
RUN pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"

# The sources come without .git; summary.json reads the commit from here.
ARG COMMIT=
RUN if [ -n "$COMMIT" ]; then \
        echo "$COMMIT" > "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/git_commit.txt"; \
    fi

FROM python:3.11-slim-bookworm
# MuJoCo draws videos through them; add g++ if updates should be compiled (algorithm.compile).
ARG SYSTEM_PACKAGES="libegl1 libosmesa6"
# Unquoted: several words.
RUN apt-get update \
    && apt-get install -y --no-install-recommends $SYSTEM_PACKAGES \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv

# A user without rights. Runs usually belong to whoever starts the container (--user), who has no entry in /etc/passwd:
# HOME and USER are set for libraries that ask for them, and /work is everybody's, as /tmp.
RUN useradd --uid 1000 --no-create-home --home-dir /work pwm && mkdir --mode 1777 /work
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/work USER=pwm
USER pwm
WORKDIR /work
ENTRYPOINT ["pwm"]
