# All images of Gozon; docker-compose.yml names the stage of each.
#
# Builds with BuildKit, the default since Docker 23; before that, set DOCKER_BUILDKIT=1 and
# COMPOSE_DOCKER_CLI_BUILD=1.

FROM rust:1.95-slim-bookworm AS rust
WORKDIR /src

# /manifests contains only what determines the dependencies: manifests and lock file, with an empty
# program for each target. /src contains the sources of the programs. BuildKit compares contents, so
# changes to other files do not invalidate the layers below.
FROM rust AS sources
COPY . .
RUN mkdir /manifests && cp Cargo.toml Cargo.lock /manifests/ \
 && for manifest in */Cargo.toml examples/*/Cargo.toml; do \
      crate=${manifest%/*}; \
      mkdir -p "/manifests/$crate/src" && cp "$manifest" "/manifests/$crate/" || exit 1; \
      for file in src/lib.rs src/main.rs $(sed -n 's/^path = "\(.*\.rs\)"$/\1/p' "$manifest"); do \
        if [ -e "$crate/$file" ]; then \
          mkdir -p "/manifests/$crate/${file%/*}" && echo 'fn main() {}' >"/manifests/$crate/$file" || exit 1; \
        fi; \
      done; \
    done \
 && for crate in e2e protocol-model stack examples; do rm -rf "$crate" && cp -r "/manifests/$crate" . || exit 1; done \
 && rm -rf nats recipes

# The layer with the dependencies: rebuilt only when a manifest changes.
FROM rust AS dependencies
COPY --from=sources /manifests ./
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    cargo build --locked --release --package orders --package payments --package gateway --package ops

FROM dependencies AS build
COPY --from=sources /src ./
# Cargo compares timestamps, and the empty programs are newer than the sources.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    find . -path ./target -prune -o -name '*.rs' -exec touch {} + \
 && cargo build --locked --release --package orders --package payments --package gateway --package ops
# From Debian, an image contains only the libraries that its program needs. It has no shell.
RUN for program in orders payments gateway gozon; do \
      root=/images/$program; \
      mkdir -p "$root/etc/ssl/certs" && cp "target/release/$program" "$root/" \
      && cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/" \
      && echo 'hosts: files dns' >"$root/etc/nsswitch.conf" \
      && ldd "$root/$program" | grep -o '/[^ ]*' | xargs -I LIBRARY cp --parents --dereference LIBRARY "$root" \
      && chroot "$root" "/$program" --version || exit 1; \
    done

FROM scratch AS orders
COPY --from=build /images/orders /
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["/orders"]

FROM scratch AS payments
COPY --from=build /images/payments /
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["/payments"]

FROM scratch AS gateway
COPY --from=build /images/gateway /
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["/gateway"]

# The operator's tool.
FROM scratch AS gozon
COPY --from=build /images/gozon /
USER 65532:65532
ENTRYPOINT ["/gozon"]

# The broker with Gozon's configuration, and a data folder that its user owns. Alpine, because the
# health check needs wget.
FROM nats:2.15-alpine AS nats
COPY nats/container.conf nats/single.conf nats/users.conf /etc/gozon/
RUN mkdir /data && chown 65532:65532 /data
USER 65532:65532
ENTRYPOINT ["nats-server"]
CMD ["--config", "/etc/gozon/container.conf"]

# PostgreSQL. When it creates the data folder, it also creates a role and a database for one
# service.
FROM postgres:18 AS database
COPY recipes/compose-database.sh /docker-entrypoint-initdb.d/
# The tmpfs that is mounted here gets this mode.
RUN chmod 3777 /var/run/postgresql
USER postgres
