# A stock PyTorch image of the release that constraints.txt names; the rest is the Makefile's.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

RUN apt-get update \
 && apt-get install -y --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /neomix
COPY . .

# The environment sees the image's own PyTorch, so that none is fetched a second time.
ENV VENV=/opt/neomix VENV_ARGS=--system-site-packages
RUN make install

ENV PATH=/opt/neomix/bin:$PATH
CMD ["python", "deepy.py", "--help"]
